"""The mesh, and the shardings of the arrays that pass between folders of the package.

Axes: `slice` and `data` replicate parameters, `context`, `expert` and `fsdp` together shard them, `context` also splits the
sequence, `expert` the experts of a layer, `tensor` splits heads, feed-forward and vocabulary. The batch is split over `slice`,
`data`, `fsdp` and `expert` together. TPU slices are connected by the data-centre network, which carries only the sums of a
step, mostly those of the gradients, and no traffic inside a layer.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import config

AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
BATCH = ("slice", "data", "fsdp", "expert")
WIDTH = ("context", "expert", "fsdp")  # split the width of the model in weights, in training; in inference `fsdp` does alone
TOKENS_BT = P(BATCH, "context")
ACT_BTD = P(BATCH, "context", None)
HEADS_BTNH = P(BATCH, "context", "tensor", None)


def axis_sizes(mesh: config.Mesh, num_devices: int) -> tuple[int, ...]:
    """Size of each axis of `AXES`, with -1 resolved; ValueError unless their product can be `num_devices`."""
    sizes = dataclasses.asdict(mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if -1 not in sizes.values() and fixed != num_devices:
        others = {axis: fixed // size for axis, size in sizes.items()}
        fits = [f"{axis}={num_devices // product}" for axis, product in others.items() if num_devices % product == 0]
        cure = f"use {' or '.join(fits)}, or" if fits else f"use sizes whose product is {num_devices}, or"
        raise ValueError(f"mesh {shown} needs {fixed} devices and {num_devices} are here; {cure} -1 for one axis")
    if num_devices % fixed:
        divisors = ", ".join(str(x) for x in range(1, num_devices + 1) if num_devices % x == 0)
        cure = f"the sizes beside -1 must give one of {divisors}"
        raise ValueError(f"mesh {shown}: {num_devices} devices do not divide by {fixed}; {cure}")
    return tuple(num_devices // fixed if size == -1 else size for size in sizes.values())


def make_mesh(mesh: config.Mesh, devices: list | None = None) -> Mesh:
    """The explicit mesh of `AXES` over `devices`, by default all; ValueError where `slice` is not the number of TPU slices."""
    devices = jax.devices() if devices is None else devices
    sizes, slices = axis_sizes(mesh, len(devices)), len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        array = _device_array(mesh_utils.create_device_mesh, sizes, devices)
    elif sizes[0] == slices:
        inside, between = (1, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
        array = _device_array(mesh_utils.create_hybrid_device_mesh, inside, between, devices)
    elif devices[0].platform == "tpu":
        raise ValueError(f"mesh.slice={sizes[0]}, and the {len(devices)} TPU devices form {slices} slices; use {slices}")
    else:  # a "slice" of GPUs is an NVLink domain, often one machine; other networks carry any axis between them
        array = np.asarray(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def mesh_over_first(**sizes: int) -> Mesh:
    """The mesh of these sizes over the first devices, as many as it needs, or all if a size is -1; other axes have size 1."""
    mesh = config.Mesh(**dict.fromkeys(AXES, 1) | sizes)
    devices = jax.devices()
    return make_mesh(mesh, devices if -1 in sizes.values() else devices[: math.prod(sizes.values())])


def _device_array(create, *arguments) -> np.ndarray:
    """The devices of a mesh; an axis of the torus is split between axes of the mesh only if no other layout exists."""
    try:
        return create(*arguments)
    except NotImplementedError:
        return create(*arguments, allow_split_physical_axes=True)


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """A mesh without devices, for shapes and shardings; axes that `sizes` leaves out have size 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Shards of the batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def spec_of(x: jax.Array) -> P:
    """The spec of an array on the current mesh, without the axes that it is reduced over."""
    return P(*jax.typeof(x).sharding.spec)


def put(x: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """An array sharded over the mesh by `spec`, of which every process has all of `x`."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda part: x[part])


def on_mesh(arrays, mesh: Mesh, donate: bool = False):
    """A tree of arrays, each split by its own spec over `mesh`, which has the devices of its present one."""
    return jax.device_put(arrays, jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), arrays), donate=donate)


def broadcast_from_first(yes: bool) -> bool:
    """The value of process 0, in every process of the run, so that all take the same branch."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(yes)))


Entry = str | tuple[str, ...] | None  # of a spec


def split_of(size: int, entry: Entry, others: Sequence[Entry]) -> Entry:
    """An entry of a spec for a dimension of this size; `others` are those of all dimensions.

    Instead of `WIDTH` it has the axes of it that no other dimension has, or `fsdp` alone where these do not divide the size.
    """
    if entry != WIDTH:
        return entry
    axes = tuple(axis for axis in WIDTH if axis not in others)
    shape = jax.sharding.get_abstract_mesh().shape
    return "fsdp" if size % math.prod(shape.get(axis, 1) for axis in axes) else axes


def width_axes(entry: Entry) -> tuple[str, ...]:
    """The axes over which an entry of a weight's spec splits the width of the model: `fsdp`, and others of `WIDTH` with it."""
    axes = entry if isinstance(entry, tuple) else (entry,)
    return axes if "fsdp" in axes else ()


def for_inference(x: jax.Array) -> jax.Array:
    """A weight whose width `fsdp` alone splits: no layer then awaits what `context` and `expert` shards hold."""
    return jax.reshard(x, P(*("fsdp" if width_axes(entry) else entry for entry in spec_of(x))))


def all_gathered(part: jax.Array, axes: tuple[str, ...], axis: int, **to: str) -> jax.Array:
    """The parts of all shards along mesh axes, joined along `axis` inside `shard_map`; its transpose is `reduce_scattered`.

    Over one mesh axis after the other: a TPU's compiler makes an all-reduce of twice the bytes of one over several.
    """
    for name in reversed(axes):
        if to or jax.lax.axis_size(name) > 1:  # over one device it copies, and may change the type
            part = jax.lax.all_gather(part, name, axis=axis, tiled=True, **to)
    return part


def reduce_scattered(term: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """This shard's part of the sum of the terms of all shards along mesh axes, inside `shard_map`."""
    for name in axes:
        if jax.lax.axis_size(name) == 1:
            continue
        term = jax.lax.psum_scatter(term, name, scatter_dimension=axis, tiled=True)
    return term


def gathered(weight: jax.Array) -> jax.Array:
    """`weight` all-gathered along the axes of `WIDTH` that split it; backward, its gradient is reduce-scattered over them.

    Written by hand: the compiler would sum the full gradient on every device and then drop all but a shard, which takes twice
    the bytes. Since the weight is typed as reduced, the gradient arrives here as the unsummed terms of the devices.
    """
    spec = spec_of(weight)
    at, axes = next(((at, axes) for at, axes in enumerate(map(width_axes, spec)) if axes), (None, ()))
    if not axes:
        return weight
    shape = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if shape[axis] > 1)  # an all-gather over one device is a copy
    other_axes = tuple(axis for axis in (*BATCH, "context") if axis not in axes)

    def split(entry: Entry, **reduced: set[str]) -> P:
        return P(*(entry if i == at else other for i, other in enumerate(spec)), **reduced)

    def shard(part):
        part = jax.lax.pcast(part, other_axes, to="reduced")
        return all_gathered(part, axes, at, to="reduced")

    gathered_spec = split(None, reduced={*axes, *other_axes})
    if not axes:
        return jax.reshard(weight, gathered_spec)
    return jax.shard_map(shard, in_specs=split(axes), out_specs=gathered_spec)(jax.reshard(weight, split(axes)))
