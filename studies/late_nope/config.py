"""RoPE that the last layer of each period has for a share of the steps only, on the probe of studies/layouts.

python launch/train.py --config=studies/late_nope/config.py:swa_rope-0.8     # without RoPE after 80% of the steps
"""

from hybrid_attn.configs import base
from studies.layouts import config as probe


def get_config(argument: str = "swa_rope-0.8"):
    """LAYOUT-SHARE: a layout of configs/recall.py with RoPE layers, and the share of the steps that these have RoPE."""
    layout, _, share = argument.rpartition("-")
    c = probe.get_config(layout)
    first = c.stages[0]
    rest = first.copy_and_resolve_references()
    first.steps = round(float(share) * first.steps)
    rest.steps -= first.steps
    rest.override = base.override({"model.kinds.R.rope_theta": None})
    c.stages = [s for s in (first, rest) if s.steps]
    return c
