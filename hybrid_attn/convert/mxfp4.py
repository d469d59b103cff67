"""Reads matrices in MXFP4 (OCP Microscaling Formats, version 1.0), in which gpt-oss is published.

32 numbers of 4 bits (a sign, two bits of exponent, one of mantissa) share a power of two. A file has two tensors of bytes for
a matrix [out, in] of each expert: `NAME_blocks` [experts, out, in / 32, 16], of which a byte has two numbers, that in its low
bits first, and `NAME_scales` [experts, out, in / 32], exponents plus 127.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

METHOD = "mxfp4"  # in the quantization_config of a config.json
BLOCKS, SCALES = "_blocks", "_scales"
BYTES, DTYPE = 16, "U8"  # of a block, and the type of both tensors
EXPONENT_BIAS = 127
MAGNITUDES = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0
VALUES = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], np.float32)  # by the four bits


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The matrices [..., out, in] in float32 of blocks [..., out, in / 32, 16] and scales [..., out, in / 32]."""
    numbers = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], -1).reshape(*blocks.shape[:-1], 2 * BYTES)
    exponents = scales.astype(np.int32) - EXPONENT_BIAS
    return np.ldexp(numbers, exponents[..., None]).reshape(*blocks.shape[:-2], -1)


class Packed(NamedTuple):
    """The two files of a tensor in MXFP4, with the interface of one file that has the tensor [experts, in, out] in float32."""

    files: tuple[Any, Any]

    def get_slice(self, name: str) -> "PackedSlice":
        return PackedSlice(*(file.get_slice(name + x) for file, x in zip(self.files, (BLOCKS, SCALES), strict=True)))


class PackedSlice(NamedTuple):
    """A tensor in MXFP4 of which one expert is read at a time, as the matrix [in, out]."""

    blocks: Any
    scales: Any

    def get_shape(self) -> list[int]:
        experts, out, number, _ = self.blocks.get_shape()
        return [experts, number * 2 * BYTES, out]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, expert: int) -> np.ndarray:
        return unpacked(self.blocks[expert], self.scales[expert]).T


def _fits(blocks, scales) -> bool:
    """Whether two tensors are the blocks and the scales of one."""
    shape, types = blocks.get_shape(), {blocks.get_dtype(), scales.get_dtype()}
    return types == {DTYPE} and len(shape) == 4 and shape[-1] == BYTES and scales.get_shape() == shape[:-1]


def with_unpacked(files: Mapping[str, Any]) -> dict[str, Any]:
    """The file of each tensor, in which `Packed` stands for the blocks and the scales that fit to each other."""
    out = dict(files)
    for blocks in (name for name in files if name.endswith(BLOCKS)):
        name = blocks.removesuffix(BLOCKS)
        scales = name + SCALES
        if scales in files and _fits(files[blocks].get_slice(blocks), files[scales].get_slice(scales)):
            out[name] = Packed((out.pop(blocks), out.pop(scales)))
    return out
