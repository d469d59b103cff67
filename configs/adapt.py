"""Trains an adapter on a checkpoint, whose parameters stay as they are.

    python launch/train.py --config=configs/adapt.py:lora,runs/hybrid_8k            # or ia3, mov, molora: docs/adapters.md

The checkpoint is a run's or one of tools/import_hf.py, and gives the model, the data, the mesh and the execution, and the
length and the batch of its last stage. Give your own text by --config.data.sources.text.paths. LoRA stands beside all matrices
of attention and of dense feed-forwards, as in QLoRA (arXiv 2305.14314), whose rate it has; vectors have the targets of their
paper: keys, values, and what enters the last matrix of a feed-forward. Their rate is ten times as high. Nothing decays.
"""

from ml_collections import ConfigDict

from hybrid_attn import checkpoint, config
from hybrid_attn.configs import base
from hybrid_attn.infer import loading

MATRICES = "*/attention/[qkvo]", "*/mlp/gate", "*/mlp/up", "*/mlp/down"
VECTORS = "*/attention/[kv]", "*/mlp/down"
TARGETS = {"lora": MATRICES, "molora": MATRICES, "ia3": VECTORS, "mov": VECTORS}
RATE = 2e-4


def get_config(argument: str):
    type, _, path = argument.partition(",")
    if type not in TARGETS or not path:
        raise ValueError(f"adapt.py:{argument}: write adapt.py:TYPE,CHECKPOINT with a TYPE of {', '.join(TARGETS)}")
    directory, step = loading.split_step(path)
    directory = loading.find(directory)
    step = loading.step_of(directory, step)
    saved = loading.saved_of(directory, step)
    index = max(len(saved.stage_steps) - 1, 0)
    values = config.with_override(checkpoint.read_config(directory, step), index)
    c = base.get_config()
    for group in ("model", "data", "train", "mesh"):
        c[group] = ConfigDict(values[group])
    c.model.adapter = base.adapter(type=type, targets=TARGETS[type])
    c.train.mlp_chunk = None
    c.init_from.path, c.init_from.step = path, step
    c.optim.lr = RATE if TARGETS[type] == MATRICES else 10 * RATE
    c.optim.weight_decay = 0.0
    old = saved.config.stages[index]
    c.stages = [base.stage(steps=300, seq_len=old.seq_len, batch=old.batch, mixture=dict(old.mixture))]
    return c
