"""Eight layers of the recall probe by the place of the global ones, and by their number at equal bytes of the KV cache.

python launch/train.py --config=studies/placement/config.py:LLLGLLLG       # the layers, from first to last
python launch/train.py --config=studies/placement/config.py:LGLGLGLG-1     # with so many key/value heads (default 2)
"""

from studies.layouts import config as probe


def get_config(argument: str = "LLLGLLLG"):
    layers, _, kv_heads = argument.partition("-")
    c = probe.get_config("rnope_swa")
    c.model.pattern, c.model.num_layers = layers, len(layers)
    c.model.num_kv_heads = int(kv_heads or 2)
    return c
