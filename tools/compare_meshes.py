"""The mesh that a length needs on a number of chips, and what training costs there, as tables in Markdown. Nothing is run.

python tools/compare_meshes.py --config=configs/hybrid_8k.py:8b --chip=v5p --chips=16,64 --lengths=8K,128K,256K

A mesh has the axes fsdp and context, and a step has one sequence for each fsdp shard. Of the meshes that fit, the one with the
fewest context shards is shown, because it sends the least. The memory of a device is an estimate from shapes, which
tools/plan.py replaces by the compiler's: a mesh fits if the estimate leaves a tenth of the device free. The cost is that of the
FLOPs of a token at --mfu of the peak. Exit code: 2 for a wrong flag or config.
"""

import contextlib
import dataclasses
from typing import NamedTuple

import jax
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench.measurement import lengths, table
from hybrid_attn.config import Config
from hybrid_attn.model import execution_on
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import abstract_mesh
from hybrid_attn.plan.estimate import estimated_memory
from hybrid_attn.plan.targets import CHIPS, GB
from hybrid_attn.train.cost import flops_per_token
from hybrid_attn.trees import check

CONFIG = config_file.define("config", None, "Config file, with its argument after a colon.", config.Config)
flags.mark_flag_as_required("config")
CHIP = flags.DEFINE_enum("chip", "v5p", [name for name, chip in CHIPS.items() if chip.peak_flops], "Chip of the devices.")
NUMBERS = flags.DEFINE_list("chips", ["16", "64", "256"], "Numbers of chips.")
LENGTHS = flags.DEFINE_list("lengths", ["8K", "32K", "128K", "256K", "1024K"], "Tokens of a sequence, 8192, 8K or 1M.")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak FLOP/s that a step reaches.", 0.001, 1.0)
ROOM = 0.9  # of the memory of a device that the estimate may take
BILLION = 10**9


class Choice(NamedTuple):
    """A mesh of `fsdp` x `context` devices and the estimate of the bytes on one of them."""

    fsdp: int
    context: int
    memory: float


def with_mesh(c: Config, length: int, fsdp: int, context: int) -> Config:
    """`c` with one stage of one sequence for each fsdp shard, over fsdp x context devices."""
    mesh = config.Mesh(1, 1, fsdp, 1, context, 1)
    stage = dataclasses.replace(c.stages[-1], seq_len=length, batch=fsdp, microbatches=1, batch_ramp=(), batch_ramp_tokens=None)
    return dataclasses.replace(c, mesh=mesh, stages=(stage,), evals=dataclasses.replace(c.evals, lengths=(1.0,)))


def splits(c: Config, number: int) -> bool:
    """Whether the batch, the sequences and the parameters divide over the mesh of `c`, of so many devices."""
    try:
        fit.check(c, number)
    except ValueError:
        return False
    return True


def choices(c: Config, length: int, number: int):
    """The meshes over which sequences of `length` split and whose kernel takes them, the fewest context shards first."""
    for context in (2**power for power in range(number.bit_length()) if number % 2**power == 0):
        of_mesh = with_mesh(c, length, number // context, context)
        if splits(of_mesh, number):
            mesh = abstract_mesh(fsdp=number // context, context=context)
            with contextlib.suppress(NotImplementedError):  # the kernel does not take so many keys of one shard
                yield Choice(number // context, context, estimated_memory(of_mesh, of_mesh.at(0), mesh, "tpu"))


def cell(c: Config, length: int, number: int, memory: int) -> str:
    """The first mesh that fits into the `memory` of a device, and its estimate."""
    for fsdp, context, size in choices(c, length, number):
        if size <= ROOM * memory:
            return f"fsdp {fsdp} x context {context}: {size / GB:.1f} GB"
    return "none fits"


def costs(c: Config, tokens: list[int]) -> list[list[str]]:
    """For each length: FLOPs of a token, tokens a second of a chip, and chip-hours of a billion tokens."""
    rows, speed = [], MFU.value * CHIPS[CHIP.value].peak_flops
    for length in tokens:
        flops = flops_per_token(with_mesh(c, length, 1, 1).at(0))
        rows.append([f"{length:,}", f"{flops / 1e9:.1f}", f"{speed / flops:,.0f}", f"{BILLION * flops / speed / 3600:,.0f}"])
    return rows


def show() -> None:
    c, tokens = config.build(CONFIG.value.values), lengths(LENGTHS.value)
    numbers = lengths(NUMBERS.value, "--chips", "numbers of chips")
    check(len(c.stages) == 1, f"--config has {len(c.stages)} stages; tools/show_recipe.py shows the memory of each")
    jax.config.update("jax_platforms", "cpu")
    execution_on("tpu", c.model, c.train)  # an error of the config: no mesh cures it
    memory = CHIPS[CHIP.value].memory
    rows = [[f"{length:,}", *(cell(c, length, number, memory) for number in numbers)] for length in tokens]
    print(table(["tokens", *(f"{number:,} x {CHIP.value}" for number in numbers)], rows))
    header = ["tokens", "GFLOPs a token", f"tokens/s of a chip at {MFU.value:.0%} MFU", "chip-hours of a billion tokens"]
    print(f"\n{table(header, costs(c, tokens))}")


def main(argv):
    programs.run(show, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
