"""hybrid_8k.py with experts: 8 in every layer, of half the width of its feed-forward, of which a token uses 2.

make train CONFIG=configs/moe.py

A token has the FLOPs of the dense model and the routers', and the feed-forwards have four times its parameters. The size 30b is
Qwen3-30B-A3B (arXiv 2505.09388) in this layout: a token uses 8 of 128 experts, and 3 of 30 B parameters.
"""

from configs import hybrid_8k
from hybrid_attn.configs import base


def get_config(size: str = "small"):
    large = size == "30b"
    c = hybrid_8k.get_config("1b" if large else size)  # of the same width
    experts = {"experts": 128, "top_k": 8, "d_ff": 768} if large else {"experts": 8, "top_k": 2, "d_ff": c.model.d_ff // 2}
    if large:
        c.model.num_layers, c.model.num_heads, c.model.num_kv_heads = 48, 32, 4
        c.mesh.fsdp, c.mesh.expert = -1, 8
    for kind in c.model.kinds.values():
        kind.mlp = base.moe(**experts)
    c.evals.names = (*c.evals.names, "routing")
    return c
