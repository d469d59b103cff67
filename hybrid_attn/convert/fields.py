"""Checks of the fields of a config.json."""

from collections.abc import Mapping

from hybrid_attn.trees import check

LARGEST = {  # several times the sizes of the largest public models; products of them must fit int64
    "vocab_size": 2**26, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1024,
    "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14,
}  # fmt: skip


def positive_int(c: Mapping, key: str) -> int:
    """The field `key` of a config.json; ValueError if it is not a positive integer of a plausible size."""
    limit = LARGEST[key] if key in LARGEST else 2**31 - 1
    positive = type(c[key]) is int and c[key] >= 1
    check(positive, f"config.json has {key}={c[key]!r}, which must be a whole number above 0")
    check(c[key] <= limit, f"config.json has {key}={c[key]}, which must be at most {limit:,}")
    return c[key]


def object_of(c: Mapping, key: str, where: str = "") -> dict:
    """The nested field `key` of a config.json, empty where it has none."""
    if not isinstance(c.get(key) or {}, Mapping):
        raise ValueError(f"config.json has {where}{key}={c[key]!r}, which must be an object")
    return dict(c.get(key) or {})
