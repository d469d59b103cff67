"""The paired baseline of hybrid_8k.py: the same sizes and data, with full attention and RoPE in every layer.

make train CONFIG=configs/rope_8k.py
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    return hybrid_8k.with_layers(size, "RRRR", R=base.kind(rope_theta=10_000.0))  # the paper's at 8K
