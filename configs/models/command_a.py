"""Command A (c4ai-command-a-03-2025): 111.058 B parameters, the layout of Command R7B at twice the depth.

    python tools/import_hf.py --model=c4ai-command-a-03-2025 --out=runs/a/checkpoints --config=configs/models/command_a.py

Sources: the config.json published with the weights; for the schedule of lengths and rates, the report (arXiv 2504.00698):
a linear cooldown from 2.5e-4 to 1e-6 over 50,000 steps, of which 30,000 at 8K, 10,000 at 32K, 5,000 at 128K, 5,000 at 256K.
"""

from configs.models import command_r7b
from hybrid_attn.configs import base

COOLDOWN = ((8_192, 30_000), (32_768, 10_000), (131_072, 5_000), (262_144, 5_000))


def get_config():
    c = command_r7b.get_config()
    m = c.model
    m.num_layers, m.d_model, m.d_ff = 64, 12_288, 36_864
    m.num_heads, m.num_kv_heads = 96, 8
    c.optim.lr, c.optim.final_lr_ratio = 2.5e-4, 1e-6 / 2.5e-4
    c.optim.schedule, c.optim.warmup_steps, c.optim.decay_fraction = "wsd", 0, 1.0
    c.stages = []
    for seq_len, steps in COOLDOWN:
        stage = base.get_config().stages[0]
        stage.seq_len, stage.steps, stage.batch = seq_len, steps, 512 * 8_192 // seq_len  # tokens in a batch: not published
        c.stages = [*c.stages, stage]
    return c
