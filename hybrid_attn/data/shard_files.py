"""The files of a shard of a token store, and of the part that a shard is made from."""

BLOCK = 2**24  # bytes of a file in memory at a time


def name(index: int, suffix: str) -> str:
    """The name of a file of shard `index`, such as shard-00000.tokens."""
    return f"shard-{index:05}.{suffix}"
