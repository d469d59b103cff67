"""The baseline with QK-norm in every layer, with which its loss falls earlier, and 600 steps instead of 1,000."""

from studies.layouts import config


def get_config():
    c = config.get_config()
    c.model.kinds.L.qk_norm = c.model.kinds.G.qk_norm = "rms"
    c.stages[0].steps = 600
    return c
