"""RNoPE-SWA, the final model of "Rope to Nope and Back Again" (arXiv 2501.18795): three windowed RoPE layers to one NoPE layer.

Sizes and commands: configs/hybrid_8k.py; the paper's is 8b, with a window of 4,096 and theta 10,000, never rescaled. No
QK-norm. At 8b, after 5 T tokens and fine-tuning, RULER retrieval is 96.1 at 8K and 74.8 at 256K (full-attention RoPE: 57.1).
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    local = hybrid_8k.get_config(size).model.kinds.L
    return hybrid_8k.with_layers(size, "LLLG", L=local, G=base.kind())
