"""RoPE, the baseline of "Rope to Nope and Back Again" (arXiv 2501.18795): full attention and RoPE in every layer.

Sizes and commands: configs/hybrid_8k.py. Theta is 10,000 here and 2,000,000 in the paper's long-context stage. At 8b after
750 B tokens: loss 1.52, MMLU 48.6, needles at 65K 9.82 of 10.
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    return hybrid_8k.with_layers(size, "R", R=base.kind(rope_theta=10_000.0))
