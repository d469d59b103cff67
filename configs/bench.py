"""The model of tools/bench_train.py: the layout of Command R7B (cohere2, without QK-norm) in a size for two CPU cores.

    python tools/bench_train.py --config.model.num_layers=4           # sizes are overridden like those of any config

6.4 M parameters, of which 0.1 M are in the vocabulary, so that a step is attention and matrices.
"""

from hybrid_attn.configs import base


def get_config():
    c = base.get_config()
    m = c.model
    m.num_layers, m.d_model, m.d_ff = 8, 256, 768
    m.num_heads, m.num_kv_heads, m.head_dim = 4, 2, 64
    m.kinds.L.window = 1024
    m.kinds.G = base.kind()  # as the family has it, which other libraries then compute too
    c.optim.warmup_steps = 0  # so that the first update counts when two losses are compared
    c.train.remat = "none"  # 32,768 tokens fit without
    return c
