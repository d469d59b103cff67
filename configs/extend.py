"""Extends a checkpoint to 4 or 16 times the length that it was trained at.

    python launch/train.py --config=configs/extend.py:4x,runs/hybrid_8k                # 8K to 32K; 4 minutes on two CPU cores
    python launch/train.py --config=configs/extend.py:16x,runs/r7b/checkpoints --config.data.tokenizer=tokenizer.json

The checkpoint is a run's or one of tools/import_hf.py, and gives the model, the data, the mesh and the optimiser. Each stage
has four times the length of the one before, as many tokens in a step, and a tenth of the steps of the training. Local layers
keep their theta and their window, and global layers without positions need nothing: that is how the family is extended (arXiv
2501.18795, 2504.00698). A global layer with RoPE gets YaRN for its new length (arXiv 2309.00071); if it has a scaling, that
one grows. The rate rises again to a tenth of the highest rate of the training and falls to a hundredth of that. The text must
have documents of the new length: tools/prepare_data.py prints their lengths.

The first command ends at 3.15 held-out bits per byte in sequences of 32,768 tokens, and at 2.76 for tokens from position 16,384
on; the model before it ends at 3.17 in sequences of 8,192. In sequences of 65,536, which it never saw, tokens from position
32,768 on are at 2.78.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hybrid_attn import checkpoint, config
from hybrid_attn.configs import base
from hybrid_attn.infer import loading
from hybrid_attn.train.schedule import schedule

MOST_STEPS = 5_000  # of a stage, those of Command A at its greatest lengths
IMPORTED_STEPS = 1_000  # of a stage, where the training of the checkpoint is not known


def scaled(scaling: config.RopeScaling, factor: int, length: int) -> dict:
    """The keys of a RoPE scaling for `factor` times the trained `length`; one that is there already grows."""
    if scaling.type != "none":
        return {"factor": scaling.factor * factor}
    return {"type": "yarn", "factor": float(factor), "original_len": length}


def get_config(argument: str):
    times, _, path = argument.partition(",")
    if times not in ("4x", "16x") or not path:
        raise ValueError(f"extend.py:{argument}: write extend.py:4x,CHECKPOINT or extend.py:16x,CHECKPOINT")
    directory, step = loading.split_step(path)
    directory = loading.find(directory)
    step = loading.step_of(directory, step)
    saved = loading.saved_of(directory, step)
    index, done = max(len(saved.stage_steps) - 1, 0), sum(saved.stage_steps)
    values = checkpoint.read_config(directory, step)
    trained, of_stage = config.build(values), config.with_override(values, index)
    length, _ = loading.trained_length(saved.config, Path(directory), done)
    c = base.get_config()
    for group in ("model", "data", "train", "mesh", "optim"):
        c[group] = ConfigDict(of_stage[group])
    c.init_from.path, c.init_from.step = path, step
    rates = jax.vmap(schedule(trained.optim, trained.pieces))(jnp.arange(max(done, 1)))
    old, rate = saved.config.stages[index], float(rates.max()) / 10 if done else c.optim.lr / 10
    steps = min(max(done // 10, 20), MOST_STEPS) if done else IMPORTED_STEPS
    with_rope = [name for name, x in saved.config.model.kinds.items() if x.rope_theta and not (x.window or x.chunk)]
    c.stages = []
    for factor in (4, 16) if times == "16x" else (4,):
        scalings = {
            f"model.kinds.{letter}.rope_scaling.{key}": value
            for letter in with_rope
            for key, value in scaled(saved.config.model.kinds[letter].rope_scaling, factor, length).items()
        }
        stage = base.stage(
            seq_len=factor * length,
            steps=steps,
            batch=max(old.batch * old.seq_len // (factor * length), 1),
            lr_schedule=base.lr_schedule(shape="linear", start=rate, end=rate / 100, warmup_steps=steps // 10),
            override=base.override(scalings),
            mixture=dict(old.mixture),
        )
        c.stages = [*c.stages, stage]
    return c
