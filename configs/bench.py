"""The model of tools/bench.py: the layout of Command R7B (cohere2, without QK-norm), for two CPU cores.

    python tools/bench.py --part=step --config=configs/bench.py --config.model.num_layers=4      # all keys can be overridden

6.4 M parameters, only 0.1 M of them in the embeddings, so that attention and matrix products take most of a step.
"""

from hybrid_attn.configs import base


def get_config():
    c = base.get_config()
    m = c.model
    m.num_layers, m.d_model, m.d_ff = 8, 256, 768
    m.num_heads, m.num_kv_heads, m.head_dim = 4, 2, 64
    m.kinds.L.window = 1024
    m.kinds.G = base.kind()  # as in cohere2, which other libraries support
    c.optim.warmup_steps = 0  # so that the first update changes the loss
    c.train.remat, c.train.unroll = "none", 2  # 32,768 tokens fit without remat
    return c
