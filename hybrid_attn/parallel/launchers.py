"""How many processes train together, which one this is, and where process 0 listens: from flags or from a launcher."""

import contextlib
import glob
import importlib.util
import os
import socket
import urllib.request

from hybrid_attn.trees import check

# Launchers from which JAX reads this with a package: their name and the package.
NEEDS = {"mpi4py": ("Open MPI 5", "mpi4py"), "k8s": ("Kubernetes", "kubernetes")}
BY_HAND = "pass --coordinator=HOST:PORT --num_processes=N --process_id=I to each process"
# The coordinator's HOST:PORT, the number of processes, that of this one, and its devices: None for all that it sees.
Membership = tuple[str, int, int, list[int] | None]


def free_port() -> int:
    """A free port of this machine whose next one, at which JAX's service listens, is free too."""
    while True:
        with socket.create_server(("localhost", 0)) as server, contextlib.suppress(OSError, OverflowError):
            port = server.getsockname()[1]
            socket.create_server(("localhost", port + 1)).close()
            return port


def from_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Membership | None:
    """The membership by the three flags; None without any of them, ValueError if one is missing or wrong."""
    values = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    absent = [f"--{name}" for name, value in values.items() if value is None]
    if len(absent) == 3:
        return None
    check(not absent, f"{' and '.join(absent)} not given; {BY_HAND}, or none of the three")
    check(num_processes >= 1, f"--num_processes={num_processes}: there is at least one")
    among = f"one of 0 to {num_processes - 1} (--num_processes={num_processes})"
    check(0 <= process_id < num_processes, f"--process_id={process_id} is not {among}")
    host, _, port = coordinator.rpartition(":")
    valid = host and port.isdecimal() and 0 < int(port) < 2**16
    check(valid, f"--coordinator={coordinator} is not HOST:PORT, as in 10.0.0.1:8476")
    bracketed = ":" not in host or (host[0] == "[" and host[-1] == "]")
    check(bracketed, f"--coordinator={coordinator}: an IPv6 address needs brackets, as in [{host.strip('[]')}]:{port}")
    return coordinator, num_processes, process_id, None


def from_launcher(timeout: float) -> Membership | None:
    """The membership from the launcher that started this process; None for a single process."""
    method = launcher()
    if method is None:
        return None
    name, package = NEEDS.get(method, (method, None))
    installed = package is None or importlib.util.find_spec(package) is not None
    check(installed, f"{name} started this process; to find the others, install the package {package}, or {BY_HAND}")
    from jax._src import clusters  # the public jax.distributed.initialize aborts when a process is missing

    try:
        address, count, number, device_ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, method, round(timeout)
        )
    except Exception as cause:  # client libraries of launchers raise their own
        raise ValueError(f"{name}: {' '.join(str(cause).split())}; fix that, or {BY_HAND}") from cause
    described = None not in (address, count, number)
    check(described, f"{name} started this process, but its variables do not describe the others; {BY_HAND}")
    env = os.environ
    only_one = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (
        "SLURM_STEP_NUM_NODES" in env and env["SLURM_STEP_NUM_NODES"] == env.get("SLURM_STEP_NUM_TASKS")
    )
    if only_one or env.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0:
        device_ids = None  # all GPUs that it sees; else JAX gives each process of a machine one of them
    return None if count == 1 else (address, count, number, device_ids)


def launcher() -> str | None:
    """JAX's name of the launcher that started several processes; None for a single process.

    The variables of a launcher may also be set in a shell inside an allocation, on a single TPU machine and in a pod outside an
    indexed job, which are single processes.
    """
    env = os.environ
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:  # before SLURM, whose steps start Open MPI's own daemons
        return "ompi" if "OMPI_MCA_orte_hnp_uri" in env else "mpi4py"
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # SLURM_NTASKS is also set in the shell of salloc and in batch scripts
        return "slurm"
    if _has_tpus():
        addresses = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        if addresses:
            return "gketpu" if "," in addresses or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1 else None
        workers, tpu_env = _metadata("worker-network-endpoints"), _metadata("tpu-env")
        slices = [line.partition(":")[2].strip(" '") for line in tpu_env.splitlines() if "MEGASCALE_NUM_SLICES" in line]
        return "gcetpu" if "," in workers or int((slices or [1])[0]) > 1 else None
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "k8s"
    return None


def _has_tpus() -> bool:
    enabled = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return enabled and bool(chips) and importlib.util.find_spec("libtpu") is not None


def _metadata(attribute: str) -> str:
    """An attribute from the metadata server of a Google Cloud machine; empty elsewhere."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as response:
            return response.read().decode()
    except OSError:
        return ""
