"""A small comparison of layouts: recall of pairs in noise, trained at 64 tokens and evaluated at up to 16 times that length.

python launch/train.py --config=configs/recall.py                       # RNoPE-SWA 3:1
python launch/train.py --config=configs/recall.py:rope                  # any of LAYOUTS
python launch/train.py --config=configs/recall.py --config.data.sources.probe.task=mqar --config.data.sources.probe.pairs=7
python launch/train.py --config=configs/recall.py --config.data.sources.probe.task=tracking --config.data.sources.probe.pairs=2
"""

from ml_collections import ConfigDict

from hybrid_attn.configs import base

LAYOUTS = {
    "rnope_swa": "LLLG",
    "rnope_swa_1to1": "LG",
    "rnope": "RG",
    "swa_rope": "LLLR",
    "swa_rope_1to1": "LR",
    "rope": "R",
    "qk_norm": "Q",
    "nope": "G",
    "swa": "L",
}
LAYER_TYPES = {
    "L": {"window": 16, "rope_theta": 10_000.0},
    "R": {"rope_theta": 10_000.0},
    "Q": {"rope_theta": 10_000.0, "qk_norm": "layernorm", "qk_norm_scope": "head"},  # as in configs/paper/qk_norm.py
    "G": {},
}


def get_config(layout: str = "rnope_swa"):
    if layout not in LAYOUTS:
        raise ValueError(f"recall.py has no layout {layout!r}; it has {', '.join(LAYOUTS)}")
    c = base.get_config()
    m, stage = c.model, c.stages[0]
    m.pattern = LAYOUTS[layout]
    m.kinds = ConfigDict({letter: base.kind(**LAYER_TYPES[letter]) for letter in sorted(set(m.pattern))})
    m.num_layers, m.d_model, m.d_ff = 4, 64, 128
    m.num_heads, m.num_kv_heads, m.head_dim = 4, 4, 16
    m.block, m.tie_embeddings = "pre", False
    m.init_std = 0.125  # d_model ** -0.5
    m.embed_scale = 8.0  # so that the input of the first layer has a standard deviation of 1
    c.data.sources = ConfigDict({"probe": base.source(task="recall")})
    c.optim.lr, c.optim.weight_decay = 2e-3, 0.01
    c.optim.schedule = "wsd"  # recall is learnt late and suddenly, and the learning rate must still be high then
    stage.steps, stage.seq_len, stage.batch = 3000, 64, 32
    c.train.remat = "none"
    c.train.log_every = 50
    c.train.checkpoint_every = 500
    c.evals.tokens = 262_144
    c.evals.lengths = (1.0, 2.0, 4.0, 8.0, 16.0)
    return c
