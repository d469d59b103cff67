"""The mesh: its axes over devices with and without slices, and errors for sizes that do not divide."""

import dataclasses
import math
import re

import jax
import pytest
from conftest import mesh_of, tiny
from jax.sharding import AxisType

from hybrid_attn import config
from hybrid_attn.config import Mesh
from hybrid_attn.model.transformer import abstract_params, unstacked
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import AXES, abstract_mesh, axis_sizes, make_mesh


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
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert [device.id for device in mesh.devices.ravel()] == list(range(8))
    assert mesh.axis_types == (AxisType.Explicit,) * 6


def test_each_slice_is_one_place_of_the_outer_axis_in_whatever_order_its_devices_come():
    devices = [Device(i, slice_index=i % 2, platform="gpu") for i in range(8)]
    mesh = make_mesh(Mesh(slice=2, data=1, fsdp=-1, expert=1, context=2, tensor=1), devices)
    assert tuple(mesh.shape[axis] for axis in AXES) == (2, 1, 2, 1, 2, 1)
    for outer in range(2):
        assert {device.slice_index for device in mesh.devices[outer].ravel()} == {outer}


@pytest.mark.parametrize("slices", [1, 4])
def test_a_wrong_number_of_slices_is_refused_with_the_right_one(slices):
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=f"mesh.slice={slices}, and the 8 TPU devices form 2 slices; use 2"):
        make_mesh(Mesh(slices, 1, -1, 1, 1, 1), devices)


def test_axes_may_cross_machines_of_gpus():
    devices = [Device(i, slice_index=i // 4, platform="gpu") for i in range(8)]
    assert make_mesh(Mesh(1, 1, 8, 1, 1, 1), devices).shape["fsdp"] == 8


def test_a_mesh_of_fewer_devices_than_there_are_takes_the_first():
    assert mesh_of(fsdp=2).devices.ravel().tolist() == jax.devices()[:2]


def stage(**changes):
    return {"stages": [{"steps": 1, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}} | changes]}


def on_mesh(changes: dict, sizes: dict) -> config.Config:
    return tiny(changes | {f"mesh.{axis}": sizes.get(axis, 1) for axis in AXES})


@pytest.mark.parametrize(
    "changes, sizes, message",
    [
        (stage(batch=6), {"data": 4}, "batch 6 does not split over 4 slice * data * fsdp * expert shards; use 4 or 8"),
        (stage(batch=3), {"slice": 2, "fsdp": 2}, "batch 3 does not split over 4 slice * data * fsdp * expert shards; use 4"),
        (
            stage(batch=8, microbatches=3),
            {"data": 2},
            "batch 8 does not split over 2 slice * data * fsdp * expert shards of 3 microbatches each; use 6 or 12, or micro",
        ),
        (
            stage(seq_len=52),
            {"context": 4},
            "seq_len 52 does not split over 4 context shards of 2 parts each; use 48 or 56, or mesh.context=2",
        ),
        (
            stage(seq_len=50) | {"train.zigzag": False},
            {"context": 4},
            "seq_len 50 does not split over 4 context shards; use 48 or 52, or mesh.context=2",
        ),
        (
            {"evals.lengths": (1.0, 1.25)},
            {"context": 8},
            "evals.lengths: 1.25 of 48 tokens, 60 does not split over 8 context shards of 2 parts each; use 48 or 64",
        ),
        ({}, {"tensor": 3}, "model.num_heads 4 does not split over 3 tensor shards; use 3 or 6, or mesh.tensor=1"),
        ({}, {"tensor": 4}, "model.num_kv_heads 2 does not split over 4 tensor shards; use 4, or mesh.tensor=2"),
        ({"model.d_ff": 49}, {"tensor": 2}, "model.d_ff 49 does not split over 2 tensor shards; use 48 or 50"),
        ({"model.vocab_size": 383}, {"tensor": 2}, "model.vocab_size 383 does not split over 2 tensor shards"),
        (
            stage(batch=24) | {"model.d_model": 40},
            {"fsdp": 12},
            "model.d_model 40 does not split over 12 fsdp shards; use 36 or 48, or mesh.fsdp=4",
        ),
        (
            {"train.context": "G=ulysses"},
            {"context": 4},
            "the 2 key/value heads of a tensor shard over 4 context shards; use mesh.context=2, or a multiple of 4",
        ),
        (
            {"train.context": "ulysses"},
            {"context": 2, "tensor": 2},
            "G,L=ulysses splits the 1 key/value heads of a tensor shard over 2 context shards; use mesh.context=1, or a "
            "multiple of 4 for model.num_kv_heads, or G=auto,L=auto",
        ),
    ],
    ids=lambda x: "",
)
def test_a_size_that_does_not_split_is_refused_with_the_axis_the_numbers_and_a_size_that_does(changes, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit.check(on_mesh(changes, sizes), math.prod(sizes.values()))


@pytest.mark.parametrize(
    "changes, sizes",
    [
        ({}, {"slice": 2, "data": 2, "fsdp": 2, "context": 6, "tensor": 2}),
        (stage(seq_len=50), {"context": 1}),
        (stage(seq_len=50) | {"train.zigzag": False}, {"context": 2}),
        (stage(batch=24, microbatches=3), {"data": 8}),
        ({"train.context": "ulysses"}, {"context": 2}),
        ({"train.context": "G=ulysses"}, {"context": 1, "tensor": 2}),
    ],
    ids=str,
)
def test_a_config_that_splits_is_accepted(changes, sizes):
    assert fit.check(on_mesh(changes, sizes), math.prod(sizes.values())) is None


def test_a_mesh_takes_the_devices_left_over_on_one_axis():
    assert axis_sizes(Mesh(1, -1, 1, 1, 2, 2), 8) == (1, 2, 1, 1, 2, 2)
    assert axis_sizes(Mesh(2, 1, 1, -1, 1, 2), 8) == (2, 1, 1, 2, 1, 2)
    with pytest.raises(ValueError, match="data and context are both -1"):
        Mesh(1, -1, 1, 1, -1, 1)
    with pytest.raises(ValueError, match="mesh.fsdp=0 must be at least 1 and at most 1,048,576, or -1"):
        Mesh(1, 1, 0, 1, 1, 1)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((1, 1, 2, 1, 2, 1), "needs 4 devices and 8 are here; use slice=2 or data=2 or fsdp=4 or expert=2 or context=4 or"),
        ((1, 3, 3, 1, 1, 1), "needs 9 devices and 8 are here; use sizes whose product is 8, or -1 for one axis"),
        ((1, -1, 3, 1, 1, 1), "8 devices do not divide by 3; the sizes beside -1 must give one of 1, 2, 4, 8"),
    ],
)
def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused_with_sizes_that_do(sizes, words):
    with pytest.raises(ValueError, match=words):
        axis_sizes(Mesh(*sizes), 8)


@pytest.mark.parametrize("width, split", [(48, 6), (44, 22)])
def test_context_and_fsdp_shards_hold_different_weights_in_training_where_they_divide_them_and_in_inference_fsdp_shards_do(
    width, split
):
    model, sizes = tiny({"model.d_model": width}).model, {"fsdp": 2, "context": 4, "tensor": 2}

    def shards(params):
        return {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)}

    with jax.sharding.use_abstract_mesh(abstract_mesh(**sizes)):
        params = abstract_params(model)
        weights = jax.eval_shape(lambda params: unstacked(model, params, "float32"), params)
    (V, D), (periods, _, N, H) = params["embed"].shape, params["periods"]["L0"]["attention"]["q"].shape
    assert shards(params)[V, D] == (V // 2, split) and shards(params)[periods, D, N, H] == (periods, split, N // 2, H)
    assert shards(weights)[V, D] == (V // 2, D // 2) and shards(weights)[D, N, H] == (D // 2, N // 2, H)
