"""The mesh: its axes over devices with and without slices."""

import dataclasses

import jax
import pytest
from conftest import mesh_of
from jax.sharding import AxisType

from hybrid_attn.config import Mesh
from hybrid_attn.parallel.mesh import AXES, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device, of which `slice_index` tells the slices apart."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "any"
    process_index: int = 0


def test_devices_without_slices_take_slice_as_an_ordinary_outer_axis():
    mesh = mesh_of(slices=2, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    assert [device.id for device in mesh.devices.ravel()] == list(range(8))
    assert mesh.axis_types == (AxisType.Explicit,) * 5


def test_each_slice_is_one_place_of_the_outer_axis_in_whatever_order_its_devices_come():
    devices = [Device(i, slice_index=i % 2, platform="gpu") for i in range(8)]
    mesh = make_mesh(Mesh(slice=2, data=1, fsdp=-1, context=2, tensor=1), devices)
    assert tuple(mesh.shape[axis] for axis in AXES) == (2, 1, 2, 2, 1)
    for outer in range(2):
        assert {device.slice_index for device in mesh.devices[outer].ravel()} == {outer}


@pytest.mark.parametrize("slices", [1, 4])
def test_slices_that_are_not_there_are_refused_with_their_number(slices):
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=f"mesh.slice={slices}, and the 8 TPU devices form 2 slices; use 2"):
        make_mesh(Mesh(slices, 1, -1, 1, 1), devices)


def test_axes_may_cross_machines_of_gpus():
    devices = [Device(i, slice_index=i // 4, platform="gpu") for i in range(8)]
    assert make_mesh(Mesh(1, 1, 8, 1, 1), devices).shape["fsdp"] == 8


def test_a_mesh_of_fewer_devices_than_there_are_takes_the_first():
    assert mesh_of(fsdp=2).devices.ravel().tolist() == jax.devices()[:2]
