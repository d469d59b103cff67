"""The collectives of a compiled program, read from the text of its optimised HLO.

Bytes are those that one device of a group of n receives: all-gather (n-1)/n of the result, reduce-scatter and all-to-all
(n-1)/n of the operand, all-reduce 2 (n-1)/n of it (a ring: reduce-scatter, then all-gather), collective-permute the operand.
A collective inside a loop counts once per iteration. It is hidden where the schedule computes between its start and its done,
or where libtpu split it over fusions that compute: each of these fusions repeats it, with the same `chain_id`.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.model.grouped import ITERATIONS
from hybrid_attn.trees import check

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
BITS = {"pred": 8, "bf16": 16, "token": 0}  # the names of other types have the number: f32, s8, u4, f8e4m3fn
NO_KERNEL = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")  # they write no array
CALLERS = ("while", "call", "conditional", "fusion", "async-start")
NAME = r"%?([\w.-]+)"
HEADER = re.compile(rf"^(?:ENTRY )?{NAME} \(.*\{{$")
INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?{NAME} = (.*?) ([a-z][a-z0-9-]*)\(")
CALLED = re.compile(r"\b(?:to_apply|calls|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)")


class Instruction(NamedTuple):
    """A line of HLO: name, type as text, operation, and the full line."""

    name: str
    type: str
    op: str
    line: str

    @property
    def op_name(self) -> str:
        """JAX's names of the scopes around it; empty where the compiler dropped them."""
        return (re.search(r'op_name="([^"]*)"', self.line) or ["", ""])[1]


class Collective(NamedTuple):
    """One collective of a program: `bytes` that a device receives per call, `times` it is called in one run.

    `axes` are the mesh axes that it runs over, `devices` the size of a group; `types` are the element types of its operands and
    `scope` is its `op_name`, with JAX's names of the surrounding scopes. `hidden` says whether the device computes meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    bytes: int
    times: int
    types: tuple[str, ...]
    scope: str
    hidden: bool

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass, recomputation included."""
        return "transpose(" in self.scope

    @property
    def total(self) -> int:
        return self.bytes * self.times


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of an HLO module by name, and the name of its entry computation."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations[header[1]] = []
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            current.append(Instruction(match[1], match[2], match[3], line))
        elif line == "}":
            current = None
    check(entry is not None, "this is no HLO text: it has no ENTRY computation; give compiled.as_text()")
    return computations, entry


def arrays(type_text: str) -> list[tuple[str, str, int]]:
    """The element type, the sizes as text and the bytes of each array of a type, tuples flattened."""
    parsed = []
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", type_text):
        bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
        elements = math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        parsed.append((dtype, dims, -(-elements * bits // 8)))
    return parsed


def trip_count(instruction: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """The iterations of a while loop: XLA's own count, or those of a counter from 0 to the constant in its condition.

    Of a loop whose length depends on the tokens, those that the innermost of its scopes names.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.line):
        return int(known[1])
    condition, body = (computations[re.search(rf"{part}={NAME}", instruction.line)[1]] for part in ("condition", "body"))
    constants = {value for line in condition if (value := _constant(line)) is not None}
    if not constants and (means := re.findall(rf"{ITERATIONS}(\d+)", instruction.op_name)):
        return int(means[-1])
    unknown = f"the loop {instruction.name} has an unknown number of iterations"
    check(len(constants) == 1, f"{unknown}: its condition has the constants {constants}")
    return -(-constants.pop() // _increment(condition, body))


def _increment(condition: Sequence[Instruction], body: Sequence[Instruction]) -> int:
    """What an iteration adds to the counter of a loop: more than 1 where the compiler unrolled it, or does not say."""
    named = {line.name: line for line in body}
    indices = [re.search(r"\), index=(\d+)", line.line) for line in condition if line.op == "get-tuple-element"]
    counter = int(indices[0][1]) if indices else None
    root = next((line for line in body if line.line.lstrip().startswith("ROOT")), None)
    if counter is None or root is None or root.op != "tuple":
        return 1
    added = named[_operands(root)[counter]]
    terms = [_constant(named[name]) for name in _operands(added)] if added.op == "add" else []
    return next((term for term in terms if term), 1)


def _constant(instruction: Instruction) -> int | None:
    """The value of a constant integer of 32 bits."""
    value = re.search(r"[su]32\[\]\S* constant\((\d+)\)", instruction.line)
    return int(value[1]) if value else None


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a compiled program (`compiled.as_text()`) on a mesh of these axis sizes, in reading order.

    Devices are numbered along the mesh, as XLA does. A start and its done are one collective, groups of single devices none.
    """
    computations, entry = parse(text)
    return _inside(computations, entry, mesh)


def called(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction runs; of a loop its body."""
    if instruction.op not in CALLERS:
        return []
    return [name for names in CALLED.findall(instruction.line) for name in re.findall(r"[\w.-]+", names)]


def estimated_cycles(instruction: Instruction) -> int:
    """Cycles of a chip that libtpu expects an instruction to take; 0 where it does not say."""
    estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
    return int(estimate[1]) if estimate else 0


def _inside(computations: Mapping[str, list[Instruction]], name: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of one run of a computation and of all that it calls; both branches of a conditional count."""
    around, collectives = {i.name: i for i in computations[name]}, []
    starts_chain = any('"AsyncCollectiveStart"' in i.line for i in computations[name])
    for at, instruction in enumerate(computations[name]):
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS:
            chained = "chain_id=" in instruction.line
            if starts_chain or not chained:
                hidden = chained or _is_hidden(computations[name][at:])
                collectives += _collective(kind, instruction, around, mesh, hidden)
        elif instruction.op in CALLERS:
            inner = [x for n in called(instruction) for x in _inside(computations, n, mesh)]
            if instruction.op == "async-start":
                inner = [x._replace(hidden=_is_hidden(computations[name][at:])) for x in inner]
            times = trip_count(instruction, computations) if instruction.op == "while" and inner else 1
            collectives += [x._replace(times=x.times * times) for x in inner]
    return collectives


def _is_hidden(scheduled: Sequence[Instruction]) -> bool:
    """Whether something that takes time stands between the first of some instructions, a start, and its done."""
    start, *later = scheduled
    if not start.op.endswith("-start"):
        return False
    done = next((at for at, i in enumerate(later) if i.op.endswith("-done") and start.name in _operands(i)), 0)
    return any(estimated_cycles(i) or (i.op == "custom-call" and "AllocateBuffer" not in i.line) for i in later[:done])


def _collective(kind: str, instruction: Instruction, around: Mapping[str, Instruction], mesh, hidden) -> list[Collective]:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.line)
        groups = [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if source != target]
    else:
        groups = replica_groups(instruction.line, math.prod(mesh.values()))
    n = max(map(len, groups), default=1)
    if n == 1:
        return []
    operands = [array for name in _operands(instruction) for array in arrays(around[name].type)]
    sent = sum(size for *_, size in operands)
    received = {
        "all-gather": (n - 1) * sent,  # the result is n operands
        "reduce-scatter": sent * (n - 1) // n,
        "all-reduce": 2 * sent * (n - 1) // n,
        "collective-permute": sent,
        "all-to-all": sent * (n - 1) // n,
    }[kind]
    types = tuple(dtype for dtype, *_ in operands)
    return [Collective(kind, axes_of(groups, mesh), n, received, 1, types, _scope(instruction, around), hidden)]


def _scope(instruction: Instruction, around: Mapping[str, Instruction]) -> str:
    """The `op_name` of an instruction, or of its nearest operand with one: compilers drop it where they rewrite."""
    waiting, seen = [instruction], set()
    while waiting:
        here = waiting.pop(0)
        if here.op_name:
            return here.op_name
        seen.add(here.name)
        waiting += [around[name] for name in _operands(here) if name in around and name not in seen]
    return ""


def _operands(instruction: Instruction) -> list[str]:
    """The names between the parentheses after the operation."""
    text, depth = instruction.line.split(f" {instruction.op}(", 1)[1], 1
    for end, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return re.findall(r"%([\w.-]+)", text[:end])
    raise ValueError(f"no end of the operands of {instruction.line}")


def replica_groups(line: str, num_devices: int) -> list[tuple[int, ...]]:
    """The groups of devices of a collective, in any of the three notations of HLO.

    {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0): that many groups and members of an iota, reshaped and transposed;
    mesh['a'=2,'b'=2] {'b'}: the devices along an axis, which `device_ids=([2,2]T(1,0))` orders as an iota. No groups are one of
    all devices.
    """
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [tuple(range(num_devices))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape = [int(d) for d in iota[1].split(",")]
        return list(map(tuple, _iota(iota[2], iota[3]).reshape(-1, shape[-1]).tolist()))
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line)
    if named and ":" not in named[4]:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        names, axes = list(sizes), re.findall(r"'([^']+)'", named[4])
        ids = _iota(named[2] or str(math.prod(sizes.values())), named[3]).reshape(list(sizes.values()))
        ids = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-len(axes), 0))
        return list(map(tuple, ids.reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()))
    raise ValueError(f"replica groups of an unknown form: {line.strip()[:300]}")


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    """The numbers from 0 in an array of that shape, its axes permuted: HLO's [2,4]T(1,0)."""
    sizes = [int(d) for d in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(d) for d in permutation.split(",")]) if permutation else ids


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which the members of a group differ."""
    coordinates = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), list(mesh.values())), -1)
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        differ |= (coordinates[list(group)] != coordinates[group[0]]).any(0)
    return tuple(itertools.compress(mesh, differ))
