"""The recall probe of configs/recall.py with a second task, copying, from which models learn to look back much sooner.

python launch/train.py --config=studies/layouts/config.py:rope        # any layout of configs/recall.py
"""

from ml_collections import ConfigDict

from configs import recall
from hybrid_attn.configs import base


def get_config(layout: str = "rnope_swa"):
    c = recall.get_config(layout)
    c.data.sources["letters"] = base.source(task="copy")
    stage = c.stages[0]
    stage.mixture = ConfigDict({"probe": 0.5, "letters": 0.5})
    stage.steps = 1200
    c.optim.lr = 3e-3
    c.train.log_every = 25
    c.train.checkpoint_every = 300
    c.train.sinks = ()
    c.evals.names = ("recall",)
    c.evals.tokens = 131_072
    return c
