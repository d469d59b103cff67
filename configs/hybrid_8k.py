"""The hybrid of "Rope to Nope and Back Again" (arXiv 2501.18795) at 8,192 tokens, in four sizes.

    make train                                                        # small; 6 minutes on two CPU cores
    python launch/train.py --config=configs/hybrid_8k.py              # the same
    python tools/train_tokenizer.py --vocab_size=65536 --out=tokenizer.json        # which the larger sizes need
    python launch/train.py --config=configs/hybrid_8k.py:1b --config.data.tokenizer=tokenizer.json         # on a pod

Three local layers (window, RoPE theta 10,000) to one global layer (NoPE, QK-norm). `c.model.kinds.G.qk_norm = "none"` gives
the paper's and Command R7B's own layout. The small one ends at 3.17 held-out bits per byte on the sources of Python 3.11's
standard library, and at 3.34 on sequences of 16,384 tokens; a byte bigram model has 3.46.
"""

from ml_collections import ConfigDict

from hybrid_attn.configs import base

SIZES = {  # layers, width, feed-forward width, query heads, key/value heads, learning rate, steps, sequences in a batch
    "small": (),  # as in hybrid_attn/configs/base.py
    "150m": (12, 768, 3072, 6, 2, 1e-3, 6_000, 64),  # 3 B tokens; hours on 8 chips
    "1b": (16, 2048, 7168, 16, 4, 6e-4, 10_000, 256),  # 20 B tokens; a day on 64 chips
    "8b": (32, 4096, 14_336, 32, 8, 3e-4, 179_000, 512),  # the paper's: 750 B tokens in its analysis stage
}


def get_config(size: str = "small"):
    if size not in SIZES:
        raise ValueError(f"hybrid_8k.py has no size {size!r}; it has {', '.join(SIZES)}")
    c = base.get_config()
    m, stage = c.model, c.stages[0]
    if size == "small":
        c.train.remat = "none"  # 8,192 tokens of this model fit into any memory; remat would cost a forward pass
        return c
    m.kinds.L.window = 4096
    m.head_dim = 128
    m.init_std = 0.02  # the value of the family
    m.vocab_size = 65_536  # a byte-pair vocabulary: --config.data.tokenizer names its tokenizer.json
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.optim.warmup_steps = 2000
    c.optim.z_loss = 1e-5
    c.data.prefetch = 4
    c.train.checkpoint_every = 1000
    c.train.keep = 3
    c.evals.tokens = 8_388_608
    m.num_layers, m.d_model, m.d_ff, m.num_heads, m.num_kv_heads, c.optim.lr, stage.steps, stage.batch = SIZES[size]
    if size == "8b":
        m.vocab_size = 256_000
        m.logit_scale = 0.25  # Command R7B's
    return c


def with_layers(size: str, pattern: str, **kinds):
    """The config of a size with other layers: their pattern, and the layer type of each letter."""
    c = get_config(size)
    c.model.pattern, c.model.kinds = pattern, ConfigDict(kinds)
    return c
