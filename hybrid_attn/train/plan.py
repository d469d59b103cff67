"""What the training step of a config needs of devices that need not be here: it is compiled for them, never run."""

import importlib.util
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hybrid_attn.config import Config
from hybrid_attn.data.packed import ARRAYS
from hybrid_attn.model import flops, run_on
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.collectives import Collective, collectives, parse, shapes
from hybrid_attn.parallel.context import SCHEMES
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.train.measurement import table
from hybrid_attn.train.step import abstract_state, make_step

GB = 10**9
FLOATS = ("weights", "bytes")  # of a batch; the other arrays are int32


class Chip(NamedTuple):
    """Bytes of memory of a chip, and how TPU tools name them: "v5litepod-16" is 16 chips, "v5p-32" 16 chips of two cores."""

    memory: int
    name: str = ""
    cores: int = 1


CHIPS = {
    "v4": Chip(32 * GB, "v4", 2),
    "v5e": Chip(16 * GB, "v5litepod"),
    "v5p": Chip(95 * GB, "v5p", 2),
    "v6e": Chip(32 * GB, "v6e"),
    "h100": Chip(80 * GB),
}
MOST_DEVICES = {"cpu": 1024, "others": 65_536}  # a CPU device is made here, with threads of its own
FORMS = "cpu:8 (a number of devices), h100:8, or a TPU's topology as v5e:4x4, v5p:4x4x4, v4:2x2x2, v6e:4x4"


class Device(NamedTuple):
    """What tokamax asks of a device."""

    platform: str
    compute_capability: str
    device_kind: str


class Target(NamedTuple):
    """Devices to compile for; `memory` is bytes of one, a CPU device's an equal part of this machine's."""

    name: str
    platform: str
    devices: list
    memory: int


def find_target(name: str) -> Target:
    """The devices of `name`, which is of one of `FORMS`; call it before JAX has looked for devices.

    ValueError for another name, NotImplementedError where the compiler for it is not installed.
    """
    kind, _, size = name.partition(":")
    jax.config.update("jax_platforms", "cpu")
    if not (kind in COMPILERS and re.fullmatch(COMPILERS[kind][0], size)):
        raise ValueError(f"target {name!r} is not known; write {FORMS}")
    count, most = math.prod(map(int, size.split("x"))), MOST_DEVICES["cpu" if kind == "cpu" else "others"]
    if count > most:
        raise ValueError(f"target {name} has {count:,} devices; at most {most:,} can be compiled for")
    return COMPILERS[kind][1](name, CHIPS.get(kind), count)


def _cpus(name: str, _, count: int) -> Target:
    jax.config.update("jax_num_cpu_devices", count)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(name, "cpu", jax.devices("cpu"), memory // count)


def _tpus(name: str, chip: Chip, count: int) -> Target:
    from jax.experimental import topologies

    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{chip.name}-{count * chip.cores}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here opens a device, so that a run may hold them meanwhile
    }
    if importlib.util.find_spec("libtpu") is None:
        raise NotImplementedError(f'target {name} needs libtpu: pip install "hybrid-attn[tpu]"')
    try:
        return Target(name, "tpu", topologies.get_topology_desc(platform="tpu", topology_name=name).devices, chip.memory)
    except (RuntimeError, ValueError) as cause:
        raise ValueError(f"target {name}: libtpu has no such topology ({cause}); write {FORMS}") from cause


def _gpus(name: str, chip: Chip, count: int) -> Target:
    from jax.experimental import topologies
    from jax.extend import backend

    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # tokamax asks the default device what to compile for; ahead of time it has to be told.
    h100 = Device("gpu", "9.0", "NVIDIA H100 80GB HBM3")
    described = (Path(__file__).parent / "targets/h100.textproto").read_text()
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology=f"1x1x{count}", target_config=described
        ).devices
    except (RuntimeError, NotImplementedError, ImportError) as cause:
        raise NotImplementedError(
            f'target {name} needs JAX\'s CUDA plugin: pip install "hybrid-attn[gpu]" ({cause})'
        ) from cause
    backend.get_default_device = lambda: h100
    return Target(name, "gpu", devices, chip.memory)


# The form of a target's size and what makes it, by its kind.
COMPILERS = {"cpu": (r"[1-9]\d*", _cpus), "h100": (r"[1-9]\d*", _gpus)}
COMPILERS |= {kind: (r"[1-9]\d*(x[1-9]\d*)+", _tpus) for kind in CHIPS if CHIPS[kind].name}


class Plan(NamedTuple):
    """What one device needs for one step. `largest` is the biggest array that is written: bytes, type and where.

    `peak` is all that is there at once, arguments included. `temporaries` is the compiler's sum, which for a TPU counts bytes
    that are never there at once.
    """

    target: Target
    axes: dict[str, int]
    arguments: int
    outputs: int
    temporaries: int
    host: int
    peak: int
    flops: float
    compiler_flops: float
    largest: tuple[int, str, str]
    collectives: list[Collective]
    text: str


def make_plan(c: Config, target: Target, stage: int = -1) -> Plan:
    """Compiles the step of a stage of `c` for `target`; ValueError where the mesh or the batch does not fit it."""
    mesh, shape = make_mesh(c.mesh, target.devices), c.stages[stage]
    fit.check(c, mesh.shape)
    batch, length = shape.batch, shape.seq_len
    run = run_on(target.platform, c.model, c.train)
    with jax.set_mesh(mesh):
        placed = NamedSharding(mesh, TOKENS_BT)
        arrays = {
            name: jax.ShapeDtypeStruct((batch, length), jnp.float32 if name in FLOATS else jnp.int32, sharding=placed)
            for name in ARRAYS
        }
        compiled = make_step(c, run).lower(abstract_state(c, mesh), arrays, shape.microbatches).compile()
    m, text = compiled.memory_analysis(), compiled.as_text()
    per_token = flops.train_flops_per_token(c.model, length)
    return Plan(
        target,
        dict(mesh.shape),
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.temp_size_in_bytes,
        m.host_temp_size_in_bytes,
        _peak(m, target.platform),
        per_token * batch * length / mesh.size,
        compiled.cost_analysis()["flops"],
        largest_array(text),
        collectives(text, mesh.shape),
        text,
    )


def _peak(m, platform: str) -> int:
    """Bytes of a device at the peak. The compiler's own figure leaves out temporaries, but for a TPU."""
    if platform == "tpu":
        return m.peak_memory_in_bytes
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def largest_array(text: str) -> tuple[int, str, str]:
    """Bytes, type and scope of the biggest array that some instruction of an HLO module writes."""
    computations, _ = parse(text)
    fused = {name for lines in computations.values() for i in lines if i.op == "fusion" for name in _called(i.line)}
    found = (0, "", "")
    for name, lines in computations.items():
        for i in lines if name not in fused else ():
            if i.op not in ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"):
                scope = re.search(r'op_name="([^"]*)"', i.line)
                for kind, (_, size) in zip(re.findall(r"\b[a-z]\w*\[[\d,]*\]", i.type), shapes(i.type), strict=False):
                    found = max(found, (size, kind, f"{i.op} {scope[1] if scope else ''}"))
    return found


def _called(line: str) -> list[str]:
    return re.findall(r"\bcalls=%?([\w.-]+)", line)


def what(collective: Collective) -> str:
    """What a collective moves, by the scopes around it: "L halo" is the keys and values of layers L."""
    parts = re.split(r"[/()]", collective.scope)
    letter = next((part[0] for part in parts if re.fullmatch(r"[A-Za-z]\d+", part)), None)
    scheme = next((part for part in parts if part in SCHEMES), None)
    if scheme and letter:
        return f"{letter} {scheme}"
    return f"{letter} layers" if letter else "the rest"


def keys_and_values(found: list[Collective], backward: bool) -> dict[str, int]:
    """Bytes that a device receives in a step for keys and values (backward, their gradients), by letter and scheme."""
    sums = Counter()
    for x in found:
        if x.backward == backward and what(x).split()[-1] in SCHEMES:
            sums[what(x)] += x.total
    return dict(sums)


def report(plan: Plan) -> str:
    """The lines and tables of a plan."""
    t = plan.target
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.axes.items())
    size, kind, where = plan.largest
    host = f"; beside them {gb(plan.host)} of the host's memory" if plan.host else ""
    lines = [
        verdict(plan),
        f"target       {t.name}: {len(t.devices)} {t.devices[0].device_kind} devices, of which all below is one's",
        f"mesh         {axes}",
        f"memory       {gb(plan.peak)} at the peak: {gb(plan.arguments)} parameters, optimiser state and batch, and "
        f"{gb(plan.peak - plan.arguments)} activations, gradients and new values{host}",
        f"largest      {gb(size)} {kind}: {where}",
        f"FLOPs        {plan.flops:.4g} by the formula, recomputation not counted; {plan.compiler_flops:.4g} by the compiler, "
        "which counts a loop's body once and custom kernels not at all",
    ]
    groups = Counter()
    for x in plan.collectives:
        key = x.kind, " ".join(x.axes), what(x), "backward" if x.backward else "forward"
        groups[(*key, "calls")] += x.times
        groups[(*key, "bytes")] += x.total
    keys = sorted({key[:4] for key in groups}, key=lambda key: -groups[(*key, "bytes")])
    rows = [[*key, f"{groups[(*key, 'calls')]:,}", gb(groups[(*key, "bytes")])] for key in keys]
    header = ["collective", "axes", "of", "pass", "calls a step", "received"]
    totals = Counter()
    for x in plan.collectives:
        totals[" ".join(x.axes)] += x.total
    sums = [[axes, "", gb(total)] for axes, total in totals.most_common()]
    return "\n".join([*lines, "", table(header, rows), "", table(["axes", "", "received"], sums)])


def fits(plan: Plan) -> bool:
    """Whether a device has room for the peak."""
    return plan.peak <= plan.target.memory


def verdict(plan: Plan) -> str:
    """Whether a device has room, for what, and how much is left or missing."""
    memory, devices = plan.target.memory, len(plan.target.devices)
    whose = (
        f"a device, {'an equal part' if devices > 1 else 'all'} of this machine's"
        if plan.target.platform == "cpu"
        else "a device"
    )
    if fits(plan):
        return f"fits         {gb(plan.peak)} of the {gb(memory)} of {whose}; {gb(memory - plan.peak)} are left"
    return (
        f"DOES NOT FIT {gb(plan.peak)}, and {gb(memory)} is the memory of {whose}; {gb(plan.peak - memory)} too much: use more "
        "devices, a larger mesh.fsdp or mesh.context, train.remat, more stages[i].microbatches, or fewer rows"
    )


def gb(size: float) -> str:
    """Bytes in GB (10^9), MB or kB."""
    unit, name = next(((unit, name) for unit, name in ((GB, "GB"), (10**6, "MB")) if size >= unit), (1000, "kB"))
    return f"{size / unit:,.3f} {name}"
