"""A small hybrid as the base model of µP: what is tuned here is good for the same model in other widths.

    python tools/coordinate_check.py --config=configs/mup.py --widths=64,256,1024 --out=check.svg    # 5 minutes on a busy core
    python tools/sweep_rates.py --config=configs/mup.py --widths=64,128,256 --out=sweep.svg           # 7 minutes on a busy core

A wider model has another d_model, and num_heads, num_kv_heads and d_ff in proportion. docs/results/mup.md has what comes out.
"""

from hybrid_attn.configs import base


def get_config():
    c = base.get_config()
    m, stage = c.model, c.stages[0]
    m.pattern, m.num_layers = "LG", 2
    m.d_model = m.mup_base_width = 64
    m.tie_embeddings, m.unembed_init_std = False, 0.0  # logits then change by the same in every width, from the first step on
    m.num_heads, m.num_kv_heads, m.head_dim, m.d_ff = 4, 2, 16, 192
    m.kinds.L.window = 32
    stage.steps, stage.seq_len, stage.batch = 60, 64, 4
    c.optim.warmup_steps = 10
    c.train.remat = "none"
    return c
