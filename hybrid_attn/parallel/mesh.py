"""The mesh, and the shardings of the arrays that pass between folders of the package.

Axes: `slice` and `data` replicate parameters, `fsdp` shards them, `context` splits the sequence, `tensor` splits heads,
feed-forward and vocabulary. The batch is split over `slice`, `data` and `fsdp` together. TPU slices are connected by the
data-centre network, which carries only the sums of a step, mostly those of the gradients, and no traffic inside a layer.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import config

AXES = ("slice", "data", "fsdp", "context", "tensor")
BATCH = ("slice", "data", "fsdp")
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


def gathered(weight: jax.Array) -> jax.Array:
    """`weight` all-gathered along `fsdp`; backward, its gradient is reduce-scattered over `fsdp`.

    Written by hand: the compiler would sum the full gradient on every device and then drop all but a shard, which takes twice
    the bytes. Since the weight is typed as reduced, the gradient arrives here as the unsummed terms of the devices.
    """
    spec = spec_of(weight)
    if "fsdp" not in spec:
        return weight
    other_axes = tuple(axis for axis in (*BATCH, "context") if axis != "fsdp")

    def shard(part):
        part = jax.lax.pcast(part, other_axes, to="reduced")
        return jax.lax.all_gather(part, "fsdp", axis=spec.index("fsdp"), tiled=True, to="reduced")

    gathered_spec = P(*(None if axis == "fsdp" else axis for axis in spec), reduced={"fsdp", *other_axes})
    if jax.sharding.get_abstract_mesh().shape["fsdp"] == 1:
        return jax.reshard(weight, gathered_spec)  # an all-gather over one device is a copy
    return jax.shard_map(shard, in_specs=spec, out_specs=gathered_spec)(weight)
