"""Command A (c4ai-command-a-03-2025): 111.058 B parameters, the layout of Command R7B at twice the depth.

    python tools/import_hf.py --model=c4ai-command-a-03-2025 --out=runs/a/checkpoints --config=configs/models/command_a.py

Source: the config.json published with the weights. configs/command_a.py trains it as its report says.
"""

from configs.models import command_r7b


def get_config():
    c = command_r7b.get_config()
    m = c.model
    m.num_layers, m.d_model, m.d_ff = 64, 12_288, 36_864
    m.num_heads, m.num_kv_heads = 96, 8
    return c
