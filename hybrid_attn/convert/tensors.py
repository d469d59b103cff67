"""How parameters lie in the tensors of the files of a family.

Most tensors are one matrix, [out, in] where ours are [in, out]. Experts have a tensor each, or one for all; gate and up may
share a tensor, one after the other or with every second entry.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hybrid_attn.config import Model
from hybrid_attn.trees import check

EXPERT = "{expert}"  # in the name of a tensor, the index of its expert


class Location(NamedTuple):
    """Where a parameter of a layer is stored. `name` follows `model.layers.N.`, and may have `EXPERT`.

    It is the part `part` of `parts` of the tensor along the axis of outputs, or with `interleaved` every entry `part`, `part` +
    `parts`, and so on. `as_ours`: the axes are in our order.
    """

    name: str
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    as_ours: bool = False


class Piece(NamedTuple):
    """A parameter, or one period of it, or one expert of these, and where in a tensor it lies; `at` is () for all of it."""

    path: str
    period: int | None
    expert: int | None
    at: tuple
    shape: tuple[int, ...]
    transposed: bool

    @property
    def is_of_experts(self) -> bool:
        """Whether it belongs to experts or their router."""
        return self.expert is not None or self.path.endswith(OF_ROUTERS)

    def ours(self, x, shape: tuple[int, ...]):
        """The array of the file with our axes; `shape` is ours, without the axes of periods and experts."""
        return (x.T if self.transposed else x).reshape(shape)

    def theirs(self, x):
        """Our array with the axes of the file."""
        return x.reshape(self.shape[::-1]).T if self.transposed else x.reshape(self.shape)


class Tensor(NamedTuple):
    """One tensor of the files, of this shape there."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


# Path of a parameter in a layer -> the name of its tensor, or its location.
LAYER = {f"attention/{name}": f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")}
LAYER |= {f"mlp/{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
TOP = {"embed": "model.embed_tokens.weight", "final_norm/weight": "model.norm.weight", "unembed": "lm_head.weight"}
MATRICES = {"gate": 1, "up": 1, "down": 1}
# The number of leading axes of our matrices that are `in`; other parameters have the same axes in both.
INPUT_AXES = {f"{group}/{name}": 1 for group in ("mlp", "mlp/shared") for name in MATRICES}
INPUT_AXES |= {"attention/q": 1, "attention/k": 1, "attention/v": 1, "attention/gate": 1, "attention/o": 2, "mlp/router": 1}
OF_ROUTERS = "mlp/router", "mlp/router_bias", "mlp/bias"
OF_EXPERTS = tuple(f"mlp/{name}{x}" for name in MATRICES for x in ("", "_bias"))  # in a mixture axis 0 counts experts


def tensors(model: Model, locations: Mapping[str, Mapping], flat: tuple[str, ...], shapes: Mapping) -> list[Tensor]:
    """The tensors of parameters with these paths and shapes, parameter by parameter; ValueError for one without a location.

    `locations` has the locations of a layer's parameters by the type of its feed-forward. Parameters in `flat` have one axis.
    """
    sizes, pieces = {}, {}
    for path, shape in shapes.items():
        for name, size, piece in _pieces(model, locations, flat, path, tuple(shape)):
            sizes[name] = size
            pieces.setdefault(name, []).append(piece)
    return [Tensor(name, size, tuple(pieces[name])) for name, size in sizes.items()]


def _pieces(model: Model, locations, flat, path: str, shape: tuple) -> Iterator[tuple[str, tuple[int, ...], Piece]]:
    """(name of the tensor, its shape, piece) of each piece of a parameter."""
    if path in TOP:
        yield TOP[path], shape, Piece(path, None, None, (), shape, False)
        return
    group, layer, leaf = path.split("/", 2)
    mlp = model.kinds[layer[0]].mlp.type
    check(leaf in locations.get(mlp, {}), f"there is no tensor for {path} of a layer with mlp.type={mlp!r}")
    location = locations[mlp][leaf]
    location = Location(location) if isinstance(location, str) else location
    before = {"prefix": 0, "periods": len(model.prefix), "tail": model.num_layers - len(model.tail)}[group]
    number, step, stacked = before + int(layer[1:]), len(model.pattern), group == "periods"
    inner = shape[1:] if stacked else shape
    experts = inner[0] if mlp == "moe" and leaf in OF_EXPERTS else None
    matrix, transposed = _of_file(location, leaf, inner if experts is None else inner[1:], leaf in flat)
    size, at = _joined(location, matrix, transposed)
    is_one = experts is not None and EXPERT not in location.name  # a tensor with all experts
    for period in range(shape[0]) if stacked else (None,):
        name = f"model.layers.{number + (period or 0) * step}.{location.name}"
        for expert in (None,) if experts is None else range(experts):
            piece = Piece(path, period, expert, ((expert,) if is_one else ()) + at, matrix, transposed)
            yield name.replace(EXPERT, str(expert)), ((experts,) if is_one else ()) + size, piece


def _of_file(location: Location, leaf: str, shape: tuple, flat: bool) -> tuple[tuple[int, ...], bool]:
    """The shape in the file of a matrix or vector of ours, and whether its axes are the other way round there."""
    axes = INPUT_AXES.get(leaf)
    if flat or not axes:
        return (math.prod(shape),) if flat else shape, False
    sizes = math.prod(shape[:axes]), math.prod(shape[axes:])
    return (sizes, False) if location.as_ours else (sizes[::-1], True)


def _joined(location: Location, shape: tuple, transposed: bool) -> tuple[tuple[int, ...], tuple]:
    """The shape of a tensor that has `location.parts` of these along the axis of outputs, and the index of this one."""
    if location.parts == 1:
        return shape, ()
    axis = 0 if transposed else len(shape) - 1
    width, i = shape[axis], location.part
    index = slice(i, None, location.parts) if location.interleaved else slice(i * width, (i + 1) * width)
    size = tuple(n * location.parts if dim == axis else n for dim, n in enumerate(shape))
    return size, (slice(None),) * axis + (index,)
