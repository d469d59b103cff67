"""How the tokens of a layer reach each other: in packed sequences here, and in a cache in `infer/`.

Letters: B batch, T tokens, D model, W taps of a short convolution, U = W - 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hybrid_attn import kernels
from hybrid_attn.config import Model
from hybrid_attn.model import short_conv, statistics
from hybrid_attn.model.attention import Attend, attention_options
from hybrid_attn.model.execution import Execution
from hybrid_attn.parallel import context

# (weight_WD, x_BTD) -> y_BTD, and in a cache the last U tokens of each request, [B, U, D], which the next ones need.
Convolve = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


class TokenMixing(NamedTuple):
    """The functions by which the tokens of a layer see each other: attention, and the short convolution of a layer with one."""

    attend: Attend
    convolve: Convolve


class LayerState(NamedTuple):
    """What `attend` and `convolve` of a layer return beside their output; `inputs_BUD` is None without a short convolution."""

    attention: Any
    inputs_BUD: jax.Array | None


def packed_mixing(model: Model, letter: str, pos_BT: jax.Array, seg_BT: jax.Array, execution: Execution) -> TokenMixing:
    """A layer of that type sees the tokens of its own packed sequences; its statistics of attention if they are measured."""
    scheme, chunk = execution.context[letter], model.kinds[letter].chunk
    options = context.ContextOptions(attention_options(model, letter), execution.kernel, scheme, execution.zigzag)
    mask_seg_BT = seg_BT if chunk is None else context.chunk_segments(pos_BT, seg_BT, chunk)

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N):
        queries = kernels.Queries(q_BTNH, pos_BT, mask_seg_BT)
        o_BTNH = context.attend(options, queries, kernels.Keys(k_BTKH, v_BTKH, pos_BT, mask_seg_BT), sinks_N)
        if not execution.statistics:
            return o_BTNH, None
        return o_BTNH, statistics.of_attention(options.attention, q_BTNH, k_BTKH, pos_BT, mask_seg_BT, sinks_N)

    def convolve(weight_WD, x_BTD):
        return short_conv.convolve_packed(weight_WD, x_BTD, seg_BT, execution.zigzag), None

    return TokenMixing(attend, convolve)
