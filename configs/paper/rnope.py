"""RNoPE of "Rope to Nope and Back Again" (arXiv 2501.18795): RoPE and NoPE layers in turn, all with full attention.

Sizes and commands: configs/hybrid_8k.py. This is RNoPE-10k; the paper's other variants raise theta in the long-context stage
and get worse with it. Needles at 128K: 8.04 of 10 at theta 10k, 7.46 at 100k, 7.02 at 2M, 6.20 at 4M; windowed, 9.56.
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    return hybrid_8k.with_layers(size, "RG", R=base.kind(rope_theta=10_000.0), G=base.kind())
