"""The paired baseline of hybrid_8k.py: the same sizes and data, with full attention and RoPE in every layer.

make train CONFIG=configs/rope_8k.py
"""

from ml_collections import ConfigDict

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    c = hybrid_8k.get_config(size)
    c.model.pattern = "RRRR"
    c.model.kinds = ConfigDict({"R": base.kind(rope_theta=10_000.0)})  # the paper's theta before its long-context stage
    return c
