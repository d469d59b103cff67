"""QK-Norm of "Rope to Nope and Back Again" (arXiv 2501.18795): the RoPE baseline with normed queries and keys.

Sizes and commands: configs/hybrid_8k.py. The norm is taken before the rotation; that it is a LayerNorm with a weight per head
is Command R+'s way, which the paper builds on. At 8b after 750 B tokens: loss 1.53, MMLU 48.2, needles at 65K 7.93 of 10.
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    return hybrid_8k.with_layers(size, "R", R=base.kind(rope_theta=10_000.0, qk_norm="layernorm", qk_norm_scope="head"))
