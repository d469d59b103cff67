"""Command R7B (c4ai-command-r7b-12-2024): 8.028 B parameters, three windowed RoPE layers to one global NoPE layer.

    python tools/import_hf.py --model=c4ai-command-r7b-12-2024 --out=runs/r7b/checkpoints --config=configs/models/command_r7b.py
    # From scratch, on a pod, with its tokenizer or one of tools/train_tokenizer.py:
    python launch/train.py --config=configs/models/command_r7b.py --config.data.tokenizer=tokenizer.json

Source: the config.json published with the weights. It was trained at 8,192 tokens and extended to 128K with theta unchanged.
"""

from hybrid_attn.configs import base


def get_config():
    c = base.get_config()
    m = c.model
    m.pattern, m.num_layers = "LLLG", 32
    m.kinds.L = base.kind(window=4096, rope_theta=50_000.0)
    m.kinds.G = base.kind()
    m.d_model, m.d_ff, m.vocab_size = 4096, 14_336, 256_000
    m.num_heads, m.num_kv_heads, m.head_dim = 32, 8, 128
    m.logit_scale, m.init_std = 0.25, 0.02
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.optim.lr = 3e-4  # not published; the value of configs/hybrid_8k.py:8b
    c.optim.warmup_steps = 2000
    c.stages[0].batch = 512  # not published
    return c
