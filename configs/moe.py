"""hybrid_8k.py with experts: 8 in every layer, of half the width of its feed-forward, of which a token uses 2.

make train CONFIG=configs/moe.py

A token has the FLOPs of the dense model and the routers', and the feed-forwards have four times its parameters.
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    c = hybrid_8k.get_config(size)
    for kind in c.model.kinds.values():
        kind.mlp = base.moe(experts=8, top_k=2, d_ff=c.model.d_ff // 2)
    return c
