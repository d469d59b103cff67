"""DroPE (arXiv 2512.12167): trains with RoPE in every layer, then drops it and trains on without positions.

    make train CONFIG=configs/drope.py                         # small; 12 minutes on two CPU cores
    python launch/train.py --config=configs/drope.py:1b --config.data.tokenizer=tokenizer.json          # on a pod

The model and the data are those of configs/rope_8k.py, which has the same number of steps and keeps RoPE. The first 80% of
the steps have RoPE and a constant rate; the others have none and a rate that falls. The paper drops RoPE of a model that is
trained, for 0.5% to 2% of its tokens; a run of few steps needs a larger share. The QK-norm that the paper adds for long second
parts is here from the start, because a stage cannot add parameters.

The small one ends at 3.49 held-out bits per byte in sequences of 8,192 tokens and at 3.65 in those of 16,384, where the hybrid
(configs/hybrid_8k.py) ends at 3.17 and 3.34.
"""

from configs import rope_8k
from hybrid_attn.configs import base

SHARE_WITHOUT = 0.2  # of the steps


def get_config(size: str = "small"):
    c = rope_8k.get_config(size)
    c.model.kinds.R.qk_norm = "rms"
    with_rope = c.stages[0]
    without = with_rope.copy_and_resolve_references()
    without.steps = round(SHARE_WITHOUT * with_rope.steps)
    with_rope.steps -= without.steps
    with_rope.lr_schedule = base.lr_schedule(shape="constant", start=c.optim.lr, warmup_steps=c.optim.warmup_steps)
    without.lr_schedule = base.lr_schedule(shape="cosine", end=c.optim.final_lr_ratio * c.optim.lr)
    without.override = base.override({"model.kinds.R.rope_theta": None})
    c.stages = [with_rope, without]
    return c
