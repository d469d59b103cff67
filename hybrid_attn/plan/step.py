"""What the training step of a config needs on devices that this machine need not have: it is compiled for them, never run."""

import re
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from hybrid_attn.config import Config
from hybrid_attn.data.packed import ARRAYS
from hybrid_attn.model import execution_on, flops
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.context import SCHEMES
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.plan.collectives import Collective, arrays, collectives, parse
from hybrid_attn.plan.targets import Target
from hybrid_attn.train.step import abstract_state, make_step


class Plan(NamedTuple):
    """What one device needs for one step, in bytes. `largest` is the largest array that is written: bytes, type and scope.

    `peak` is the peak memory, arguments included. `temporaries` is the compiler's sum, which for a TPU counts arrays that are
    never allocated at the same time.
    """

    target: Target
    axes: dict[str, int]
    arguments: int
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
    mesh, of_stage = make_mesh(c.mesh, target.devices), c.at(stage)
    fit.check(c, mesh.shape)
    batch, length = of_stage.batch, of_stage.seq_len
    execution = execution_on(target.platform, of_stage.model, of_stage.train)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, TOKENS_BT)
        inputs = {name: jax.ShapeDtypeStruct((batch, length), dtype, sharding=sharding) for name, dtype in ARRAYS.items()}
        compiled = make_step(of_stage, execution).lower(abstract_state(c, mesh), inputs).compile()
    m, text = compiled.memory_analysis(), compiled.as_text()
    per_token = flops.train_flops_per_token(of_stage.model, length)
    return Plan(
        target,
        dict(mesh.shape),
        m.argument_size_in_bytes,
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
    """Peak memory of a device, in bytes. The compiler's own figure includes temporaries only for a TPU."""
    if platform == "tpu":
        return m.peak_memory_in_bytes
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def largest_array(text: str) -> tuple[int, str, str]:
    """Bytes, type and scope of the largest array that an instruction of an HLO module writes."""
    computations, _ = parse(text)
    fusions = [i.line for lines in computations.values() for i in lines if i.op == "fusion"]
    fused = {name for line in fusions for name in re.findall(r"\bcalls=%?([\w.-]+)", line)}
    largest = (0, "", "")
    for name, lines in computations.items():
        for i in lines if name not in fused else ():
            if i.op not in ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"):
                scope = re.search(r'op_name="([^"]*)"', i.line)
                for dtype, dims, size in arrays(i.type):
                    largest = max(largest, (size, f"{dtype}[{dims}]", f"{i.op} {scope[1] if scope else ''}"))
    return largest


def payload(collective: Collective) -> str:
    """What a collective moves, from the scopes around it: "L halo" are the keys and values of layers of type L."""
    parts = re.split(r"[/()]", collective.scope)
    letter = next((part[0] for part in parts if re.fullmatch(r"[A-Za-z]\d+", part)), None)
    scheme = next((part for part in parts if part in SCHEMES), None)
    if scheme and letter:
        return f"{letter} {scheme}"
    return f"{letter} layers" if letter else "other"
