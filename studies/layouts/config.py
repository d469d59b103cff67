"""The recall probe of configs/recall.py with a second task, copying, from which models learn to look back much sooner.

python launch/train.py --config=studies/layouts/config.py:rope          # any layout of configs/recall.py
python launch/train.py --config=studies/layouts/config.py:rnope-64      # a window of 64 in its RoPE layers at the last step
"""

from ml_collections import ConfigDict

from configs import recall
from hybrid_attn.configs import base


def get_config(argument: str = "rnope_swa"):
    """LAYOUT or LAYOUT-WINDOW: with a window of RoPE layers (`R`) in the last step only, and so in the evaluation after it."""
    layout, _, window = argument.partition("-")
    c = recall.get_config(layout)
    c.data.sources["letters"] = base.source(task="copy")
    stage = c.stages[0]
    stage.mixture = ConfigDict({"probe": 0.5, "letters": 0.5})
    stage.steps = 1000
    c.optim.optimiser, c.optim.lr = "muon", 1e-2
    c.train.log_every = 25
    c.train.checkpoint_every = 250
    c.train.sinks = ()
    c.evals.names = ("recall",)
    c.evals.tokens = 65_536
    if window:
        last = stage.copy_and_resolve_references()
        stage.steps, last.steps = stage.steps - 1, 1
        last.override = base.override({"model.kinds.R.window": int(window)})
        c.stages = [stage, last]
    return c
