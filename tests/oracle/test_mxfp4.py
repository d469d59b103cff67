"""Matrices in MXFP4 are those that the library reads."""

import numpy as np
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hybrid_attn.convert import mxfp4


def test_matrices_are_those_of_the_library():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 10, 4, 16), np.uint8)
    scales = rng.integers(100, 140, (3, 10, 4)).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(mxfp4.unpacked(blocks, scales).mT, theirs.numpy())
