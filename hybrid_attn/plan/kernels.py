"""The kernels that a GPU runs for one layer, read from the text of a program that was compiled for it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hybrid_attn.bench.measurement import table
from hybrid_attn.plan.collectives import NO_KERNEL, Instruction, arrays, called, parse, trip_count

LIBRARIES = {"mosaic_gpu": "Mosaic", "triton": "Triton", "cudnn$fmha": "cuDNN", "cublas": "cuBLAS"}
PASSES = ("forward", "recomputed", "backward")


class Launch(NamedTuple):
    """A kernel of a layer: its pass, what runs it, JAX's names of what it computes, its result, and launches a step."""

    layer: str
    which_pass: str
    kernel: str
    scope: str
    type: str
    bytes: int
    times: int


def launches(text: str) -> list[Launch]:
    """Every kernel inside a layer of a compiled program, in the order in which they run."""
    computations, entry = parse(text)
    return list(_inside(computations, entry, 1))


def _inside(computations: Mapping[str, list[Instruction]], name: str, times: int) -> Iterator[Launch]:
    for i in computations[name]:
        layer = re.search(r"/([A-Za-z]\d+)/(?!.*/[A-Za-z]\d+/)(.*)", i.op_name)
        if i.op in ("while", "call", "conditional"):
            inner = times * trip_count(i, computations) if i.op == "while" else times
            for body in called(i):
                yield from _inside(computations, body, inner)
        elif layer and i.op not in (*NO_KERNEL, "constant", "after-all") and not i.op.endswith("-done"):
            backward = "transpose(" in i.op_name
            which_pass = PASSES[0] if not backward else PASSES[1 if "rematted" in i.op_name else 2]
            largest = max(arrays(i.type), key=lambda array: array[2], default=("nothing", "", 0))
            kernel, size = _kernel(computations, i), sum(array[2] for array in arrays(i.type))
            yield Launch(layer[1], which_pass, kernel, _scope(layer[2]), f"{largest[0]}[{largest[1]}]", size, times)


def _kernel(computations: Mapping[str, list[Instruction]], i: Instruction) -> str:
    """What runs an instruction: a library, or what XLA compiled a fusion to do."""
    if i.op == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', i.line)[1]
        return next((name for part, name in LIBRARIES.items() if part in target), target)
    if i.op != "fusion":
        return i.op
    inside = {x.op for x in computations[re.search(r"\bcalls=%?([\w.-]+)", i.line)[1]]} - {"parameter", "bitcast", "constant"}
    if inside & {"dot", "fusion"} and "gemm" in i.line:
        return "matrix product"
    if inside <= {"copy", "transpose", "slice", "dynamic-slice", "tuple", "get-tuple-element"}:
        return "copy"
    return "reduction" if "reduce" in inside else "elementwise"


def _scope(scope: str) -> str:
    """The names of an operation without those of JAX's transforms."""
    transforms = r"[A-Za-z]\d*|checkpoint|rematted_computation|closed_call|shard_map|(jit|vmap)\(.*"
    parts = [part for part in scope.split("/") if not re.fullmatch(transforms, part)]
    text = "/".join(parts)
    if text.startswith("tokamax:"):
        return "tokamax attention"
    return text.partition("/tokamax:")[0].removesuffix("/pallas_call")


def report(text: str) -> str:
    """For the first layer of each type, in all periods, its kernels by pass, with those that do the same in one row."""
    first: dict[str, str] = {}
    every = launches(text)
    for layer in sorted({x.layer for x in every}, key=lambda layer: int(layer[1:])):
        first.setdefault(layer[0], layer)
    counts, sizes, largest = Counter(), Counter(), {}
    for x in every:
        if first[x.layer[0]] == x.layer:
            key = x.layer, x.which_pass, x.kernel, x.scope
            counts[key] += x.times
            sizes[key] += x.times * x.bytes
            largest[key] = max(largest.get(key, (0, "")), (x.bytes, x.type))
    ordered = sorted(counts, key=lambda key: (int(key[0][1:]), PASSES.index(key[1]), -sizes[key]))
    rows = [[*key, largest[key][1], f"{counts[key]}", f"{sizes[key] / 10**6:,.2f}"] for key in ordered]
    totals = Counter()
    for key in ordered:
        totals[key[:2]] += counts[key]
    sums = [[*key, f"{total}"] for key, total in totals.items()]
    header = ["layer", "pass", "kernel", "of", "largest result", "launches a step", "MB written"]
    return "\n".join([table(header, rows), "", table(["layer", "pass", "launches a step"], sums)])
