"""The models of tools/bench.py: the layouts of Command R7B (cohere2, without QK-norm) and of Olmo 3, for two CPU cores.

    python tools/bench.py --part=step --config=configs/bench.py --config.model.num_layers=4      # all keys can be overridden
    python tools/bench.py --part=step --config=configs/bench.py:olmo3

6.4 M parameters, only 0.1 M of them in the embeddings, so that attention and matrix products take most of a step. The layout of
Olmo 3 has the same sizes and windows; its global layers have RoPE. It is the one that MaxText has too.
"""

from hybrid_attn.configs import base


def get_config(layout: str = "cohere2"):
    if layout not in ("cohere2", "olmo3"):
        raise ValueError(f"bench.py has no layout {layout!r}; it has cohere2, olmo3")
    c = base.get_config()
    m = c.model
    m.num_layers, m.d_model, m.d_ff = 8, 256, 768
    m.num_heads, m.num_kv_heads, m.head_dim = 4, 2, 64
    m.kinds.L.window = 1024
    if layout == "cohere2":
        m.kinds.G = base.kind()
    else:
        m.block, m.norm, m.rope_layout = "post", "rms", "half"
        norm = {"qk_norm": "rms", "qk_norm_scope": "projection"}
        m.kinds.L.update(norm)
        m.kinds.G = base.kind(rope_theta=m.kinds.L.rope_theta, **norm)
    c.optim.warmup_steps = 0  # so that the first update changes the loss
    c.train.remat, c.train.unroll = "none", 2  # 32,768 tokens fit without remat
    return c
