"""Command A's cooldown (arXiv 2504.00698): 50,000 steps over four lengths, with one linear rate from 2.5e-4 to 1e-6.

    python launch/train.py --config=configs/command_a.py:tiny     # all four stages; 4 minutes on two CPU cores
    python launch/train.py --config=configs/command_a.py --config.init_from.path=MODEL --config.data.tokenizer=tokenizer.json

30,000 steps at 8K tokens, 10,000 at 32K, 5,000 at 128K and 5,000 at 256K. Theta and window of the local layers stay as they
are, and the global layers have no positions: nothing of the model changes with the length, only the mesh does. The full size
has 111 B parameters, and meshes for 1,024 devices: tools/show_recipe.py computes 1.6e23 FLOPs for its 2.1e11 tokens, 10 days on
TPU v5p at 40% of the peak, and up to 81 GB of a device. Tokens in a batch were not published. tiny has the ratios of the
lengths and of the steps, and ends at a held-out loss of 3.04 bits per byte at 8,192 tokens (configs/hybrid_8k.py, with 8,192
tokens in all of its 300 steps, ends at 3.17).
"""

from configs.models import command_a
from hybrid_attn.configs import base

STAGES = ((8_192, 30_000, 1), (32_768, 10_000, 1), (131_072, 5_000, 4), (262_144, 5_000, 8))  # tokens, steps, context shards


def get_config(variant: str = "full"):
    if variant not in ("full", "tiny"):
        raise ValueError(f"command_a.py has no variant {variant!r}; it has full, tiny")
    c = command_a.get_config() if variant == "full" else base.get_config()
    c.optim.lr, c.optim.final_lr_ratio = 2.5e-4, 1e-6 / 2.5e-4
    c.optim.schedule, c.optim.warmup_steps = "linear", 0
    if variant == "tiny":
        c.optim.lr = 4e-3  # from initial values, which need a higher rate and a warm-up
        c.optim.warmup_steps = 5
        c.model.kinds.L.update(window=128, rope_theta=50_000.0)
        c.model.kinds.G.qk_norm = "none"
        c.train.remat = "none"
    else:
        c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 8
    stage, c.stages = c.stages[0], []
    for seq_len, steps, context in STAGES:
        stage = stage.copy_and_resolve_references()
        stage.seq_len, stage.steps, stage.batch = seq_len, steps, 512 * 8_192 // seq_len
        if variant == "tiny":
            stage.seq_len, stage.steps, stage.batch = seq_len // 32, steps // 500, 32 * 8_192 // seq_len
        else:
            stage.microbatches = min(4, stage.batch * context // 128)  # of one sequence on each batch shard
            stage.override = base.override({"mesh.context": context})
        c.stages = [*c.stages, stage]
    return c
