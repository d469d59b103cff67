import contextlib
import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training_process import MESHES, STEPS, config_of, signalled_at

from hybrid_attn import checkpoint
from hybrid_attn.parallel import launchers, processes
from hybrid_attn.train import loop

ROOT = Path(__file__).parents[1]
QUIET = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
LAUNCHERS = ("OMPI", "SLURM", "TPU", "MEGASCALE", "KUBERNETES", "JOB_COMPLETION", "GCE", "JAX_COORDINATOR", "CUDA_VISIBLE")


@contextlib.contextmanager
def start_processes(part, folder, numbers=(0, 1), count=2, devices=4, host="localhost"):
    """The processes `numbers` of `count` that do `part` of training_process.py."""
    port, program = launchers.free_port(), [sys.executable, str(ROOT / "tests/training_process.py"), part]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": QUIET}
    started = [
        subprocess.Popen([*program, *map(str, (f"{host}:{port}", count, i, devices, folder))], start_new_session=True, **pipes)
        for i in numbers
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ends(started, seconds=120):
    """(exit status, stdout, the last line of stderr) of each."""
    outputs = [process.communicate(timeout=seconds) for process in started]
    return [(p.returncode, out, err.strip().rpartition("\n")[2]) for p, (out, err) in zip(started, outputs, strict=True)]


def losses(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / f"corpus/{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(10 + i)))
    return folder


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_of_eight_and_restore_its_checkpoints(folder, tmp_path, monkeypatch):
    """To within 1e-6, for two processes add shards in another order than one does; on another mesh to within 1e-5."""
    with start_processes("train_and_stop", folder) as started:
        assert loop.train(config_of(folder, MESHES[0]), tmp_path / "straight")
        (status0, output0, error0), (status1, output1, error1) = ends(started, 240)
    assert (status0, status1) == (0, 0), error0 + error1
    (stopped,) = checkpoint.steps(folder / "stopped/checkpoints")
    assert 2 <= stopped < STEPS
    assert f"stopped after step {stopped}" in output0.splitlines()[-1]
    assert output1 == "" and "Gloo" not in output0

    with monkeypatch.context() as patch:
        patch.setattr(loop.Metrics, "advance", loop.Metrics.advance)
        signalled_at(stopped + 1)
        loop.train(config_of(folder, MESHES[0]), folder / "stopped")
    assert checkpoint.steps(folder / "stopped/checkpoints")[-1] > stopped
    with start_processes("resume_and_stop_in_the_evaluation", folder) as started:
        (status0, _, error0), (status1, _, error1) = ends(started, 240)
    assert (status0, status1) == (0, 0), error0 + error1
    assert checkpoint.steps(folder / "stopped/checkpoints")[-1] == STEPS - 1
    assert 1 <= len(list((folder / f"stopped/evals/{STEPS - 1}/units").iterdir())) < 3
    with start_processes("resume_and_break", folder) as started:
        broken = ends(started, 240)
    actual, expected = losses(folder / "stopped"), losses(tmp_path / "straight")
    assert list(actual) == list(range(1, STEPS + 1))
    for step in actual:
        assert actual[step] == pytest.approx(expected[step], rel=1e-6 if step <= stopped else 1e-5), step
    runs = folder / "stopped", tmp_path / "straight"
    evals = [[json.loads(x) for x in (run / "evals.jsonl").read_text().splitlines()] for run in runs]
    assert {"position", "needle", "bigram"} == {record["eval"] for record in evals[0]}
    for ours, other in zip(*evals, strict=True):
        assert ours.keys() == other.keys()
        for name, value in ours.items():
            assert value == (other[name] if isinstance(value, str) else pytest.approx(other[name], rel=1e-5)), name
    answers = [(run / f"evals/{STEPS}/answers.jsonl").read_text().splitlines() for run in runs]
    assert len(answers[0]) == 10 and sum(a == b for a, b in zip(*answers, strict=True)) >= 8  # a near tie may go either way
    assert [(status, error) for status, _, error in broken] == [
        (1, "error: process 1: a device of mine is broken"),
        (3, "error: process 1: a device of mine is broken"),
    ]


def test_a_process_that_never_joins_is_named_by_all_that_did(folder):
    with (
        start_processes("join", folder, numbers=(0, 2), count=4) as two,
        start_processes("join", folder, numbers=(1,)) as alone,
    ):
        ends_of_two, ((status1, _, error1),) = ends(two), ends(alone)
    for status, _, error in ends_of_two:
        assert status == 1
        assert "processes 1 and 3 never joined: 2 of 4 came within 3 s" in error
    assert status1 == 1
    assert "process 0 never joined: nothing answered process 1 at localhost:" in error1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_at_once(folder, killed):
    with start_processes("wait_for_death", folder) as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        before = time.monotonic()
        started[killed].kill()
        status, _, error = ends(started, 20)[1 - killed]
    assert time.monotonic() - before < 15
    assert (status, error.partition(" without")[0]) == (1, f"error: process {killed} ended")


def test_an_error_that_looks_like_a_wrong_input_beside_a_killed_process_is_a_failure(folder):
    """The killed process had not heard of it: a file may be missing because its writer is gone."""
    with start_processes("miss_a_file_of_a_stopped_process", folder) as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        os.waitid(os.P_PID, started[0].pid, os.WSTOPPED | os.WNOWAIT)
        (folder / "stopped").touch()
        assert started[1].stderr.readline() == "looked for the file\n"
        started[0].kill()
        ((status, _, error),) = ends(started[1:], 20)
    assert (status, error.partition(" without")[0]) == (1, "error: process 0 ended")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_others_and_itself_once_it_continues(folder, stopped):
    with start_processes("wait_for_a_stopped_process", folder) as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        started[stopped].send_signal(signal.SIGSTOP)
        ((status, _, error),) = ends([started[1 - stopped]], 30)
        time.sleep(3)  # jax's heartbeats have time to see that the other is gone
        started[stopped].send_signal(signal.SIGCONT)
        ((status_of_stopped, _, error_of_stopped),) = ends([started[stopped]], 20)
    expected = rf"process {stopped} has sent nothing for \d s: it is stopped, or its machine or the network is gone"
    assert status == status_of_stopped == 1
    assert re.fullmatch(f"error: {expected}", error)
    assert re.fullmatch(f"error: {expected}" if stopped else f"error: process 1: {expected}", error_of_stopped)


@pytest.mark.slow
def test_a_wrong_input_to_one_process_ends_all_with_code_2_and_its_message(folder):
    with start_processes("meet_a_wrong_input", folder, host="[::1]") as started:
        assert [(status, error) for status, _, error in ends(started)] == [(2, "error: process 1: no such tokenizer")] * 2


@pytest.mark.slow
def test_processes_with_other_flags_do_not_train_together(folder):
    program = [sys.executable, str(ROOT / "launch/train.py"), f"--config={ROOT}/configs/hybrid_8k.py"]
    port = launchers.free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": QUIET, "cwd": folder}
    started = [
        subprocess.Popen(
            [*program, f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}", f"--workdir=run{i}",
             f"--config.optim.lr=1e-{3 + i}"], **pipes
        )
        for i in range(2)
    ]  # fmt: skip
    expected = (
        "error: the processes were started differently: config.optim.lr: process 1 has 0.0001, process 0 has 0.001; "
        f"workdir: process 1 has {folder}/run1, process 0 has {folder}/run0"
    )
    assert [(status, error) for status, _, error in ends(started)] == [(2, expected)] * 2
    assert not [*folder.glob("run*")]


def test_a_signal_to_one_process_in_the_evaluation_ends_all_with_everything_saved(folder):
    with start_processes("stop_in_the_evaluation", folder) as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        started[0].send_signal(signal.SIGTERM)
        assert [(status, out) for status, out, _ in ends(started, 20)] == [(0, "stopped in the evaluation\n"), (0, "")]


@pytest.mark.parametrize("steps, expected", [((4, 4, 4), 5), ((7, 6, 7), 8), ((-1, -1, -1), 0)])
def test_processes_agree_on_the_first_step_that_none_has_begun(steps, expected):
    port = launchers.free_port()
    hub = processes.Hub("localhost", port, 3, 10)
    hub.start()
    links = [None] * 3

    def join(number):
        links[number] = processes._join(("localhost", port), number, 3, 10)

    threads = [threading.Thread(target=join, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    peers = [processes.Peers(number, link, hub if number == 0 else None) for number, link in enumerate(links)]
    for _ in range(2):  # what each was started with, and later its data
        early = [threading.Thread(target=peer.agree, args=({"seed": "1"},), daemon=True) for peer in peers[:2]]
        for thread in early:
            thread.start()
        time.sleep(0.05)
        assert all(thread.is_alive() for thread in early)
        peers[2].agree({"seed": "1"})
        for thread in early:
            thread.join(10)
    for peer, step in zip(peers, steps, strict=True):
        assert step < 0 or not peer.reached(step)
    peers[1].request_stop()
    peers[2].request_stop()  # a cluster signals many
    until = time.monotonic() + 10
    while not all(peer._stop_at is not None for peer in peers) and time.monotonic() < until:
        time.sleep(0.01)
    for peer, step in itertools.product(peers, range(10)):
        assert peer.reached(step) == (step >= expected)
    for peer in reversed(peers):
        peer.close()
    hub.join(10)
    assert not hub.is_alive()


@pytest.mark.parametrize(
    "hellos, message",
    [
        ([(1, 3), (1, 3)], "two processes have --process_id=1; give each its own --process_id"),
        ([(1, 4)], "process 1 expects 4 processes and process 0 3; give all the same number"),
    ],
)
def test_wrongly_started_processes_get_an_error_each(hellos, message):
    port, messages = launchers.free_port(), []
    processes.Hub("localhost", port, 3, 20).start()
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    def join(number, count):
        with pytest.raises(ValueError) as error:
            processes._join(("localhost", port), number, count, 20)
        messages.append(str(error.value))

    threads = [threading.Thread(target=join, args=hello) for hello in hellos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert messages == [message] * len(hellos)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("a:1", 2, None), r"--process_id not given; pass --coordinator=HOST:PORT .* or none of the three"),
        ((None, None, 1), r"--coordinator and --num_processes not given"),
        (("a:1", 2, 2), r"--process_id=2 is not one of 0 to 1 \(--num_processes=2\)"),
        (("a", 2, 0), r"--coordinator=a is not HOST:PORT"),
        (("a:70000", 2, 0), r"--coordinator=a:70000 is not HOST:PORT"),
        (("::1:1234", 2, 0), r"--coordinator=::1:1234: an IPv6 address needs brackets, as in \[::1\]:1234"),
        (("a:1", 2, 0, float("nan")), r"--join_timeout=nan is no number of seconds"),
    ],
)
def test_flags_that_do_not_say_who_this_is_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*flags)


def test_a_process_ends_although_nobody_reads_its_output():
    program = "from hybrid_attn.parallel import processes; processes._end('the end', 3)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stderr=writer, env=QUIET, timeout=60)
    os.close(writer)
    assert done.returncode == 3


def test_nothing_is_printed_after_the_error_that_ends_a_process(tmp_path):
    program = """
import sys, threading, time
from hybrid_attn.parallel import processes
def traceback():
    while True:
        sys.stderr.write("a line of a traceback\\n")
class Slow:
    def flush(self):
        time.sleep(0.2)
threading.Thread(target=traceback, daemon=True).start()
sys.stdout = Slow()
time.sleep(0.1)
processes._end("error: the cause", 3)
"""
    with open(tmp_path / "stderr", "wb") as stderr:
        done = subprocess.run([sys.executable, "-c", program], stderr=stderr, env=QUIET, timeout=60)
    first, *_, last = (tmp_path / "stderr").read_text().splitlines()
    assert (done.returncode, first, last) == (3, "a line of a traceback", "error: the cause")


@pytest.fixture
def bare(monkeypatch):
    """An environment without a launcher."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    return monkeypatch


STEP = {
    "SLURM_JOB_ID": "100", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    "variables, tpus, expected",
    [
        ({}, False, None),
        (STEP, False, "slurm"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False, None),  # the shell of salloc
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False, None),  # a batch script
        (STEP | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"}, False, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False, "mpi4py"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "gketpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False, "k8s"),
    ],
)
def test_a_launcher_is_known_by_its_variables_and_a_single_process_by_their_lack(bare, variables, tpus, expected):
    bare.setattr(launchers, "_has_tpus", lambda: tpus)
    for name, value in variables.items():
        bare.setenv(name, value)
    assert launchers.launcher() == expected


@pytest.mark.parametrize(
    "workers, tpu_env, expected",
    [("a:0:10.0.0.1,b:1:10.0.0.2", "", "gcetpu"), ("a:0:10.0.0.1", "", None), ("a", "MEGASCALE_NUM_SLICES: '2'", "gcetpu")],
)
def test_a_tpu_machine_reads_its_pod_from_the_metadata_server(bare, workers, tpu_env, expected):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write((workers if self.path.endswith("/worker-network-endpoints") else tpu_env).encode())

        log_message = lambda *_: None  # noqa: E731

    bare.setattr(launchers, "_has_tpus", lambda: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        bare.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert launchers.launcher() == expected
        server.shutdown()
        thread.join()
    assert launchers.launcher() is None  # and no server is no reason to wait


@pytest.mark.parametrize(
    "changes, devices",
    [({}, None), ({"SLURM_STEP_NUM_NODES": "1"}, [0]), ({"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "3"}, None)],
)
def test_slurm_gives_a_node_s_only_process_all_its_gpus_and_others_one_each(bare, changes, devices):
    for name, value in (STEP | changes).items():
        bare.setenv(name, value)
    address, *others = launchers.from_launcher(5)
    assert address.startswith("node001:") and others == [2, 1, devices]


def test_a_launcher_without_a_needed_variable_is_an_error_with_its_cure(bare):
    bare.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Open MPI 5 started .* install the package mpi4py, or pass --coordinator=HOST:PORT"):
        launchers.from_launcher(5)
