"""The KV cache of a model: its shapes, writing, reading on a mesh, int8 numbers, compression."""

from hybrid_attn.infer.cache.compress import Compression, compressed
from hybrid_attn.infer.cache.shapes import (
    Cache,
    empty,
    num_bytes,
    power_of_two,
    repeated,
    request_slots,
    resized,
)

__all__ = ["Cache", "Compression", "compressed", "empty", "num_bytes", "power_of_two", "repeated", "request_slots", "resized"]
