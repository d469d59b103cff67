"""The metrics of experts, of feed-forwards and of attention, as means over the layers that have them."""

from collections.abc import Mapping

import jax

from hybrid_attn.model import attention_experts, moe

OF_LAYERS = {moe.LAYERS: moe.METRICS, attention_experts.LAYERS: attention_experts.METRICS}
SHARES = moe.SHARES, attention_experts.SHARES  # arrays with a number for each expert of a layer


def metrics(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Means over the layers, and the microbatches, of which `sums` are sums; none where no layer has experts."""
    return {name: sums[name] / sums[layers] for layers, names in OF_LAYERS.items() if layers in sums for name in names}
