"""How long a program compiled for TPUs takes, as far as its compiler says, read from the text of its scheduled HLO.

libtpu writes the cycles that it expects of a chip beside every fusion, copy, reduction and conversion: its own model of matrix
units, vector units and memory. It writes none for collectives and custom kernels (Pallas). A plan counts those apart: a
collective by its bytes and by whether the device computes meanwhile, the kernels of attention and experts by their FLOPs.
"""

from collections.abc import Mapping, Set

from hybrid_attn import config
from hybrid_attn.config import Model, Train
from hybrid_attn.model.transformer import MIXERS, layer_names, specs
from hybrid_attn.plan.collectives import Instruction, called, estimated_cycles, parse, trip_count

KERNEL_SHARE = 0.5  # of the peak FLOP/s of a chip, at which these kernels are taken to run
# Products of an attention kernel in units of the two of a forward pass: dq takes three, dk and dv take four.
FORWARD, BACKWARD = 1.0, 3.5
# Those of a kernel of experts in units of its three: backward gate and up again, three for rows and three for matrices.
EXPERTS = 1.0 + 8 / 3


def cycles(text: str) -> int:
    """Cycles that libtpu expects of a program (`compiled.as_text()`), in loops once per iteration."""
    computations, entry = parse(text)
    return _cycles(computations, entry)


def _cycles(computations: Mapping[str, list[Instruction]], name: str) -> int:
    """Cycles of one run of a computation and of all that it calls; of a conditional those of its longest branch."""
    total = 0
    for instruction in computations[name]:
        names = () if instruction.op == "fusion" else called(instruction)  # a fusion has one number for all that is in it
        inner = max((_cycles(computations, name) for name in names), default=0)
        if inner and instruction.op == "while":
            inner *= trip_count(instruction, computations)
        total += estimated_cycles(instruction) + inner
    return total


def kernel_flops(model: Model, train: Train, length: int) -> float:
    """FLOPs of the attention kernels of a training step over a sequence of `length` tokens, with those that remat repeats."""
    remat, total = config.remat(model, train), 0.0
    for letter in model.layers:
        repeated = FORWARD if remat[letter] == "layer" else 0.0
        forward = MIXERS[model.kinds[letter].mixer].sequence_flops(model, model.kinds[letter], length)
        total += forward * (FORWARD + repeated + BACKWARD)
    return total


def expert_flops(model: Model, letters: Set[str]) -> float:
    """FLOPs of a token in kernels of experts, in a training step, where these compute the layers of types `letters`.

    None is repeated by remat: their backward pass needs no output of theirs.
    """
    total = 0.0
    for group, of_group, number in model.groups:
        for name, letter in layer_names(of_group):
            if letter in letters:
                experts = specs(model)[group][name]["mlp"]
                total += number * EXPERTS * sum(2 * experts[matrix].multiplications for matrix in ("gate", "up", "down"))
    return total
