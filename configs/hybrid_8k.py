"""The hybrid of "Rope to Nope and Back Again" (arXiv 2501.18795) at 8,192 tokens, in four sizes.

    make train                                                        # small; 6 minutes on two CPU cores
    python launch/train.py --config=configs/hybrid_8k.py              # the same
    python tools/train_tokenizer.py --vocab_size=65536 --out=tokenizer.json        # which the larger sizes need
    python launch/train.py --config=configs/hybrid_8k.py:1b --config.data.tokenizer=tokenizer.json         # on a pod

Three local layers (window, RoPE theta 10,000) to one global layer (NoPE, QK-norm). `c.model.kinds.G.qk_norm = "none"` gives
the paper's and Command R7B's own layout. The small one ends at 3.17 held-out bits per byte on the sources of Python 3.11's
standard library, and at 3.34 on sequences of 16,384 tokens; a byte bigram model has 3.46.
"""

from hybrid_attn.configs import base

SIZES = ("small", "150m", "1b", "8b")


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
    if size == "150m":  # 3 B tokens; hours on 8 chips
        m.num_layers, m.d_model, m.d_ff, m.num_heads, m.num_kv_heads = 12, 768, 3072, 6, 2
        c.optim.lr = 1e-3
        stage.steps, stage.batch = 6_000, 64
    elif size == "1b":  # 20 B tokens; a day on 64 chips
        m.num_layers, m.d_model, m.d_ff, m.num_heads, m.num_kv_heads = 16, 2048, 7168, 16, 4
        c.optim.lr = 6e-4
        stage.steps, stage.batch = 10_000, 256
    elif size == "8b":  # the paper's: 32 layers, a vocabulary of 256,000, 750 B tokens in its analysis stage
        m.num_layers, m.d_model, m.d_ff, m.num_heads, m.num_kv_heads = 32, 4096, 14_336, 32, 8
        m.vocab_size = 256_000
        m.logit_scale = 0.25  # Command R7B's
        c.optim.lr = 3e-4
        stage.steps, stage.batch = 179_000, 512
    return c
