"""Devices to compile for that this machine need not have: TPU topologies, H100s, CPU devices."""

import importlib.util
import math
import os
import re
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import jax

from hybrid_attn.trees import check

GB = 10**9


class Chip(NamedTuple):
    """The memory of a chip in bytes, and its name in TPU tools: "v5litepod-16" are 16 chips, "v5p-32" 16 chips of two cores.

    `peak_flops` are FLOP/s of bfloat16 products, `clock` is in Hz: the peak over the FLOPs of all matrix units in a cycle.
    """

    memory: int
    name: str = ""
    cores: int = 1
    peak_flops: float = 0.0
    clock: float = 0.0


CHIPS = {
    "v4": Chip(32 * GB, "v4", 2, 275e12, 1.05e9),
    "v5e": Chip(16 * GB, "v5litepod", 1, 197e12, 1.5e9),
    "v5p": Chip(95 * GB, "v5p", 2, 459e12, 1.75e9),
    "v6e": Chip(32 * GB, "v6e", 1, 918e12, 1.75e9),
    "h100": Chip(80 * GB),
}
Device = namedtuple("Device", "platform compute_capability device_kind")  # the attributes that tokamax reads
FORMS = "cpu:8 (a number of devices), h100:8, or a TPU's topology as v5e:4x4, v5p:4x4x4, v4:2x2x2, v6e:4x4"


class Target(NamedTuple):
    """Devices to compile for; `memory` is bytes of one, for a CPU device an equal part of this machine's."""

    name: str
    platform: str
    devices: list
    memory: int


def find_target(name: str) -> Target:
    """The devices of a target of `FORMS`, before JAX looks for any; NotImplementedError where its compiler is not installed."""
    kind, _, size = name.partition(":")
    jax.config.update("jax_platforms", "cpu")
    known = kind in COMPILERS and re.fullmatch(COMPILERS[kind][0], size)
    check(known, f"target {name!r} is not known; write {FORMS}")
    count = math.prod(map(int, size.split("x")))
    most = 1024 if kind == "cpu" else 65_536  # CPU devices are created on this machine, with threads of their own
    check(count <= most, f"target {name} has {count:,} devices; at most {most:,} can be compiled for")
    return COMPILERS[kind][1](name, CHIPS.get(kind), count)


def _cpus(name: str, _, count: int) -> Target:
    jax.config.update("jax_num_cpu_devices", count)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(name, "cpu", jax.devices("cpu"), memory // count)


def _tpus(name: str, chip: Chip, count: int) -> Target:
    from jax.experimental import topologies
    from jax.extend import backend

    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{chip.name}-{count * chip.cores}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened: a run may hold them meanwhile
    }
    if importlib.util.find_spec("libtpu") is None:
        raise NotImplementedError(f'target {name} needs libtpu: pip install "hybrid-attn[tpu]"')
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError) as cause:
        raise ValueError(f"target {name}: libtpu has no such topology ({cause}); write {FORMS}") from cause
    backend.get_default_device = lambda: devices[0]  # for which tokamax compiles
    return Target(name, "tpu", devices, chip.memory)


def _gpus(name: str, chip: Chip, count: int) -> Target:
    from jax.experimental import topologies
    from jax.extend import backend

    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # tokamax compiles for the default device.
    h100 = Device("gpu", "9.0", "NVIDIA H100 80GB HBM3")
    description = (Path(__file__).parent / "descriptions/h100.textproto").read_text()
    options = {"topology_name": "h100", "topology": f"1x1x{count}", "target_config": description}
    try:
        devices = topologies.get_topology_desc(platform="cuda", **options).devices
    except (RuntimeError, NotImplementedError, ImportError) as cause:
        cure = 'pip install "hybrid-attn[gpu]"'
        raise NotImplementedError(f"target {name} needs JAX's CUDA plugin: {cure} ({cause})") from cause
    backend.get_default_device = lambda: h100
    return Target(name, "gpu", devices, chip.memory)


# The form of a target's size and the function that creates it, by its kind.
COMPILERS = {"cpu": (r"[1-9]\d*", _cpus), "h100": (r"[1-9]\d*", _gpus)}
COMPILERS |= {kind: (r"[1-9]\d*(x[1-9]\d*)+", _tpus) for kind in CHIPS if CHIPS[kind].name}
