"""The mesh, and the specs of the arrays that cross the borders between rooms.

Axes: `slice` and `data` replicate parameters, `fsdp` shards them, `context` splits the sequence, `tensor` splits heads,
feed-forward and vocabulary. The batch is split over `slice`, `data` and `fsdp` together. Between TPU slices lies
the data-centre network, which carries the sums of a step, those of the gradients above all, and nothing of a layer.
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
    """Size of each axis of `AXES` on `num_devices` devices, with -1 resolved; ValueError where they do not multiply out."""
    sizes = dataclasses.asdict(mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if -1 not in sizes.values() and fixed != num_devices:
        others = {axis: fixed // size for axis, size in sizes.items()}
        fits = [f"{axis}={num_devices // rest}" for axis, rest in others.items() if num_devices % rest == 0]
        cure = f"use {' or '.join(fits)}, or" if fits else f"use sizes whose product is {num_devices}, or"
        raise ValueError(f"mesh {shown} needs {fixed} devices and {num_devices} are here; {cure} -1 for one axis")
    if num_devices % fixed:
        divisors = ", ".join(str(x) for x in range(1, num_devices + 1) if num_devices % x == 0)
        raise ValueError(
            f"mesh {shown}: {num_devices} devices do not divide by {fixed}; the sizes beside -1 must give one of {divisors}"
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes.values())


def make_mesh(mesh: config.Mesh, devices: list | None = None) -> Mesh:
    """The explicit mesh of `AXES` over `devices` (all of them by default); ValueError where TPU slices are not `slice`'s."""
    devices = jax.devices() if devices is None else devices
    sizes, types = axis_sizes(mesh, len(devices)), (AxisType.Explicit,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return Mesh(_placed(mesh_utils.create_device_mesh, sizes, devices), AXES, axis_types=types)
    if sizes[0] == slices:
        inside, between = (1, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
        return Mesh(_placed(mesh_utils.create_hybrid_device_mesh, inside, between, devices), AXES, axis_types=types)
    if devices[0].platform == "tpu":
        raise ValueError(f"mesh.slice={sizes[0]}, and the {len(devices)} TPU devices form {slices} slices; use {slices}")
    # A "slice" of GPUs is a domain of NVLink, often one machine; other networks take every axis across.
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def mesh_over_first(**sizes: int) -> Mesh:
    """The mesh of these axes over the first devices that it needs, all of them where a size is -1; others have size 1."""
    wanted = config.Mesh(**dict.fromkeys(AXES, 1) | sizes)
    devices = jax.devices()
    return make_mesh(wanted, devices if -1 in sizes.values() else devices[: math.prod(sizes.values())])


def _placed(create, *arguments) -> np.ndarray:
    """The devices of a mesh; an axis takes part of one of the torus only where sizes leave no other way."""
    try:
        return create(*arguments)
    except NotImplementedError:
        return create(*arguments, allow_split_physical_axes=True)


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """A mesh without devices, for shapes and shardings alone; axes not named have size 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec_of(x: jax.Array) -> P:
    """How an array lies on the mesh in force, without what it is reduced over."""
    return P(*jax.typeof(x).sharding.spec)


def place(x: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """An array that every process has whole, laid out over the mesh: each gives its own devices their parts."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda part: x[part])


def broadcast_from_first(yes: bool) -> bool:
    """What process 0 says, in every process of the run: they must all go the same way."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(yes)))


def gathered(weight: jax.Array) -> jax.Array:
    """`weight` whole along `fsdp`: an all-gather forward, and backward a reduce-scatter of its gradient over `fsdp`.

    By hand, for the compiler sums the whole gradient on every device and then drops all but a shard: twice the bytes. Typed
    as reduced, the gradient arrives here as the unsummed parts of the devices.
    """
    spec = spec_of(weight)
    if "fsdp" not in spec:
        return weight
    rest = tuple(axis for axis in (*BATCH, "context") if axis != "fsdp")

    def shard(part):
        return jax.lax.all_gather(
            jax.lax.pcast(part, rest, to="reduced"), "fsdp", axis=spec.index("fsdp"), tiled=True, to="reduced"
        )

    whole = P(*(None if axis == "fsdp" else axis for axis in spec), reduced={"fsdp", *rest})
    if jax.sharding.get_abstract_mesh().shape["fsdp"] == 1:
        return jax.reshard(weight, whole)  # an all-gather over one device is a copy
    return jax.shard_map(shard, in_specs=spec, out_specs=whole)(weight)
