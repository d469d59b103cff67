"""Files of experts in MXFP4 become the matrices that they stand for."""

import math

import jax
import numpy as np
import pytest
from converted import GOLDEN, edit, edit_tensors, read, write

from hybrid_attn.convert import families, hf, mxfp4
from hybrid_attn.model import abstract_params

NAME = "model.layers.{}.mlp.experts.{}_proj"


def number(bits: int) -> float:
    """A float of a sign, two bits of exponent with the bias 1, and one of mantissa."""
    sign, exponent, mantissa = bits >> 3, (bits >> 1) & 3, bits & 1
    value = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return math.copysign(value, -sign)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[experts, in, out], number by number."""
    out = np.empty((blocks.shape[0], 32 * blocks.shape[2], blocks.shape[1]))
    for e, o, i in np.ndindex(blocks.shape[:3]):
        for j, byte in enumerate(blocks[e, o, i].tolist()):
            for half, bits in enumerate((byte & 15, byte >> 4)):
                out[e, 32 * i + 2 * j + half, o] = number(bits) * 2.0 ** (int(scales[e, o, i]) - 127)
    return out


def test_every_number_of_four_bits_has_its_value_and_the_scale_of_its_block():
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 2, 8, 16)
    scales = np.array([0, 1, 100, 126, 127, 128, 130, 252] * 2, np.uint8).reshape(1, 2, 8)
    np.testing.assert_array_equal(mxfp4.unpacked(blocks, scales), decoded(blocks, scales).mT)
    assert mxfp4.unpacked(np.full((1, 1, 16), 0x72, np.uint8), np.array([[128]], np.uint8))[0, :4].tolist() == [2, 12, 2, 12]


@pytest.fixture
def packed(tmp_path, one_device):
    """A directory of a tiny gpt_oss with random bytes for its experts, and the matrices that these are, by name."""
    described = hf.read_config(GOLDEN["gpt_oss"]) | {"hidden_size": 64, "intermediate_size": 32}
    model = families.model_of(described)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(model))
    directory = write(tmp_path / "model", model, params, "gpt_oss")
    edit(directory, quantization_config={"quant_method": mxfp4.METHOD, "modules_to_not_convert": ["lm_head"]})
    rng, matrices = np.random.default_rng(0), {}

    def pack(tensors):
        for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(120, 130, blocks.shape[:-1]).astype(np.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            matrices[name] = mxfp4.unpacked(blocks, scales).mT

    edit_tensors(directory, pack)
    return directory, matrices


def test_a_model_with_packed_experts_has_the_matrices_of_all_of_them(packed):
    directory, matrices = packed
    model, params = read(directory)
    leaves, period = hf.flat(params), len(model.pattern)
    assert len(matrices) == 2 * model.num_layers and not model.prefix and not model.tail
    for layer in range(model.num_layers):
        path = f"periods/{model.pattern[layer % period]}{layer % period}/mlp"
        gate_up = matrices[NAME.format(layer, "gate_up")]
        expected = {"gate": gate_up[..., ::2], "up": gate_up[..., 1::2], "down": matrices[NAME.format(layer, "down")]}
        for leaf, x in expected.items():
            np.testing.assert_array_equal(np.asarray(leaves[f"{path}/{leaf}"])[layer // period], x)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, name: x.pop(f"{name}_scales"), "_proj: missing -> "),
        (lambda x, name: x.update({f"{name}_scales": x[f"{name}_scales"][:, :1]}), "_proj: missing -> "),
        (lambda x, name: x.update({key: x[key][:1] for key in (f"{name}_blocks", f"{name}_scales")}), r"_proj: \[1, 32, 64\]"),
    ],
)
def test_blocks_without_their_scales_or_of_other_shapes_are_refused(packed, change, message):
    directory, _ = packed
    edit_tensors(directory, lambda tensors: change(tensors, NAME.format(0, "down")))
    with pytest.raises(ValueError, match=f"tensors of experts in .*{message}"):
        read(directory)
