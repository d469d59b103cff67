"""Tiny Aya (tiny-aya-base): 3.349 B parameters for 70 languages, 27 windowed RoPE layers and 9 global NoPE layers.

    python tools/import_hf.py --model=tiny-aya-base --out=runs/tiny_aya/checkpoints --config=configs/models/tiny_aya.py
    # From scratch, on 64 chips, with its tokenizer or one of tools/train_tokenizer.py:
    python launch/train.py --config=configs/models/tiny_aya.py --config.data.tokenizer=tokenizer.json

Source: the config.json published with the weights.
"""

from configs.models import command_r7b


def get_config():
    c = command_r7b.get_config()
    m = c.model
    m.num_layers, m.d_model, m.d_ff, m.vocab_size = 36, 2048, 11_008, 262_144
    m.num_heads, m.num_kv_heads = 16, 4
    m.logit_scale = 1.0
    c.optim.lr = 6e-4  # not published
    return c
