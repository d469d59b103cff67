"""What the training step of a config needs on devices that this machine need not have: it is compiled for them, never run."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from hybrid_attn.bench.measurement import table
from hybrid_attn.config import Config, Model, mlp_width
from hybrid_attn.data.packed import fields_of
from hybrid_attn.model import execution_on
from hybrid_attn.model.moe import by_kernel
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.context import SCHEMES
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.plan import timing
from hybrid_attn.plan.collectives import NO_KERNEL, Collective, arrays, collectives, parse
from hybrid_attn.plan.targets import CHIPS, GB, Target
from hybrid_attn.train.cost import flops_per_token
from hybrid_attn.train.resume import check_overrides
from hybrid_attn.train.step import abstract_state, make_step


class Plan(NamedTuple):
    """What one device needs for one step, in bytes. `largest` is the largest array that is written: bytes, type and scope.

    `peak` is the peak memory, arguments included. `temporaries` is the compiler's sum, which for a TPU counts arrays that are
    never allocated at the same time. `cycles`, of TPUs alone, are what the compiler expects without collectives and kernels;
    `kernel_flops` are those of the kernels of attention and experts, recomputation included. `compiler_flops` is None for a GPU
    that is not there, whose compiler counts none. `expert_helps` says whether a larger `mesh.expert` would save memory.
    """

    target: Target
    axes: dict[str, int]
    arguments: int
    temporaries: int
    host: int
    peak: int
    flops: float
    compiler_flops: float | None
    cycles: int
    kernel_flops: float
    largest: tuple[int, str, str]
    collectives: list[Collective]
    text: str
    expert_helps: bool = False


def make_plan(c: Config, target: Target, stage: int = -1) -> Plan:
    """Compiles the step of a stage of `c` for `target`; ValueError where the mesh or the batch does not fit it."""
    of_stage = c.at(stage)
    fit.check(c, len(target.devices))
    mesh = make_mesh(of_stage.mesh, target.devices)
    batch, length = of_stage.batch, of_stage.seq_len
    execution = execution_on(target.platform, of_stage.model, of_stage.train)
    with jax.set_mesh(mesh):
        check_overrides(c)
        sharding = NamedSharding(mesh, TOKENS_BT)
        inputs = {
            name: jax.ShapeDtypeStruct((batch, length), dtype, sharding=sharding) for name, dtype in fields_of(of_stage).items()
        }
        kernel_flops = timing.kernel_flops(of_stage.model, of_stage.train, length)
        kernel_flops += timing.expert_flops(of_stage.model, by_kernel(of_stage.model, execution, mesh.shape["tensor"])) * length
        compiled = make_step(of_stage, execution).lower(abstract_state(c, mesh, of_stage.index), inputs).compile()
    m, text = compiled.memory_analysis(), compiled.as_text()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    if target.platform == "tpu":  # the only one whose compiler includes temporaries in its own figure
        peak = m.peak_memory_in_bytes
    return Plan(
        target,
        dict(mesh.shape),
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        m.host_temp_size_in_bytes,
        peak,
        flops_per_token(of_stage) * batch * length / mesh.size,
        (compiled.cost_analysis() or {}).get("flops"),
        timing.cycles(text) if target.platform == "tpu" else 0,
        kernel_flops * batch / mesh.size,
        largest_array(text),
        collectives(text, mesh.shape),
        text,
        expert_helps(of_stage.model, mesh.shape, batch * length // mesh.size),
    )


def expert_helps(model: Model, axes: Mapping[str, int], tokens: int) -> bool:
    """Whether a layer needs less memory with twice the `mesh.expert`, `tokens` being those of one device.

    A device then holds half of the matrices, in bfloat16, and of the sums of their gradients, in float32; and it gathers twice
    the copies of tokens, for each of which there are an output and a gradient in bfloat16.
    """
    split, layer_types = axes["expert"], [model.kinds[letter] for letter in dict.fromkeys(model.layers)]
    mixtures = [layer_type for layer_type in layer_types if layer_type.mlp.type == "moe"]

    def saved(layer_type) -> float:
        matrices = 3 * layer_type.mlp.experts * model.d_model * mlp_width(model, layer_type) / (split * axes["tensor"])
        copies = tokens * split * layer_type.mlp.top_k * model.d_model
        return matrices / 2 * (2 + 4) - copies * (2 + 2)

    is_possible = all(layer_type.mlp.experts % (2 * split) == 0 for layer_type in mixtures)
    return is_possible and any(saved(layer_type) > 0 for layer_type in mixtures)


def largest_array(text: str) -> tuple[int, str, str]:
    """Bytes, type and scope of the largest array that an instruction of an HLO module writes."""
    computations, _ = parse(text)
    fusions = [i.line for lines in computations.values() for i in lines if i.op == "fusion"]
    fused = {name for line in fusions for name in re.findall(r"\bcalls=%?([\w.-]+)", line)}
    largest = (0, "", "")
    for name, lines in computations.items():
        for i in lines if name not in fused else ():
            if i.op not in NO_KERNEL:
                for dtype, dims, size in arrays(i.type):
                    largest = max(largest, (size, f"{dtype}[{dims}]", f"{i.op} {i.op_name}"))
    return largest


def payload(collective: Collective) -> str:
    """What a collective moves, from the scopes around it: "L halo" are the keys and values of layers of type L."""
    parts = re.split(r"[/()]", collective.scope)
    letter = next((part[0] for part in parts if re.fullmatch(r"[A-Za-z]\d+", part)), None)
    scheme = next((part for part in parts if part in SCHEMES), None)
    if scheme and letter:
        return f"{letter} {scheme}"
    return f"{letter} layers" if letter else "other"


def report(plan: Plan) -> str:
    """A plan as text: whether it fits, memory, FLOPs, and what is sent between devices, by mesh axis."""
    t = plan.target
    size, kind, where = plan.largest
    counted = ""
    if plan.compiler_flops is not None:
        counted = f"; {plan.compiler_flops:.4g} by the compiler, which counts a loop's body once and custom kernels not at all"
    host = f"; beside them {gb(plan.host)} of the host's memory" if plan.host else ""
    lines = [
        verdict(plan),
        f"target       {t.name}: {len(t.devices)} {t.devices[0].device_kind} devices; the numbers below are per device",
        f"mesh         {' x '.join(f'{axis} {length}' for axis, length in plan.axes.items())}",
        f"memory       {gb(plan.peak)} at the peak: {gb(plan.arguments)} parameters, optimiser state and batch, and "
        f"{gb(plan.peak - plan.arguments)} activations, gradients and new values{host}",
        f"largest      {gb(size)} {kind}: {where}",
        f"FLOPs        {plan.flops:.4g} by the formula, recomputation not counted{counted}",
        *([time_line(plan)] if plan.cycles else []),
    ]
    calls, received, hidden, by_axes = Counter(), Counter(), Counter(), Counter()
    for x in plan.collectives:
        axes = " ".join(x.axes)
        key = x.kind, axes, payload(x), "backward" if x.backward else "forward"
        calls[key] += x.times
        received[key] += x.total
        hidden[key] += x.total * x.hidden
        by_axes[axes] += x.total
    rows = [[*key, f"{calls[key]:,}", gb(total), gb(hidden[key])] for key, total in received.most_common()]
    header = ["collective", "axes", "of", "pass", "calls a step", "received", "while computing"]
    sums = [[axes, "", gb(total)] for axes, total in by_axes.most_common()]
    return "\n".join([*lines, "", table(header, rows), "", table(["axes", "", "received"], sums)])


def time_line(plan: Plan) -> str:
    """How long a step takes by the compiler's own estimate, and what that leaves out."""
    chip = CHIPS[plan.target.name.partition(":")[0]]
    kernels = plan.kernel_flops / (timing.KERNEL_SHARE * chip.peak_flops)
    hidden, received = (sum(x.total for x in plan.collectives if x.hidden >= least) for least in (True, False))
    return (
        f"time         {plan.cycles / chip.clock:.3f} s by the compiler, {plan.cycles:,} cycles at {chip.clock / 1e9:.2f} GHz, "
        f"without custom kernels ({kernels:.3f} s if their {plan.kernel_flops:.4g} FLOPs run at {timing.KERNEL_SHARE:.0%} "
        f"of the peak) and without collectives ({gb(hidden)} of {gb(received)} arrive while the chip computes)"
    )


def fits(plan: Plan) -> bool:
    """Whether a device has room for the peak."""
    return plan.peak <= plan.target.memory


def verdict(plan: Plan) -> str:
    """Whether a device has room, for what, and how much is left or missing."""
    memory, devices = plan.target.memory, len(plan.target.devices)
    device = "a device"
    if plan.target.platform == "cpu":
        device += f", {'an equal part' if devices > 1 else 'all'} of this machine's"
    if fits(plan):
        return f"fits         {gb(plan.peak)} of the {gb(memory)} of {device}; {gb(memory - plan.peak)} are left"
    axes = "mesh.expert, mesh.fsdp" if plan.expert_helps else "mesh.fsdp"
    return (
        f"DOES NOT FIT {gb(plan.peak)}, and {gb(memory)} is the memory of {device}; {gb(plan.peak - memory)} too much: use "
        f"more devices, a larger {axes} or mesh.context, train.remat, more stages[i].microbatches or a smaller batch"
    )


def gb(size: float) -> str:
    """Bytes in GB (10^9), MB or kB."""
    unit, name = next(((unit, name) for unit, name in ((GB, "GB"), (10**6, "MB")) if size >= unit), (1000, "kB"))
    return f"{size / unit:,.3f} {name}"
