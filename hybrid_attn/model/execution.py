"""How a model is executed: the choices of the `train` keys, resolved for a platform."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn import config, kernels
from hybrid_attn.config import Model, Table, Train
from hybrid_attn.model.params import Dot

# libtpu's async collective fusion, which is off by default: collectives travel in steps beside the tiles of matrix products.
OVERLAP = (
    ("xla_enable_async_all_gather", "true"),
    ("xla_enable_async_all_reduce", "true"),
    ("xla_tpu_enable_async_collective_fusion", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true"),
    ("xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),
    ("xla_tpu_overlap_compute_collective_tc", "true"),
)
CPU_MLP_CHUNK = 512  # 512 x 768 in float32 stay in 2 MiB of cache: 2x as fast as all tokens at once, recomputation included


class Chunks(NamedTuple):
    """How many tokens of a device a feed-forward computes at a time, and whether it saves their products for the backward pass.

    Where these are not saved, the backward pass computes them again, chunk by chunk.
    """

    tokens: int
    saves_products: bool


def unchanged(leaves: dict) -> dict:
    return leaves


class Execution(NamedTuple):
    """How a model is executed: keys of `train` in configs/base.py, resolved for a platform, which never change the function.

    `transform` and `dot` are extension points, which may change it: training, evaluation and decoding apply both inside the
    layers. `transform` makes the leaves of a layer from those that are stored; in place of a leaf, a group of leaves may be
    stored under the same name: int8 numbers with scales. It does not reach the embedding, the table of the logits and the final
    norm. (`transforms/` has adapters, weights beside a matrix, and factors in place of one.) `dot` multiplies activations with
    every matrix of a layer, and with the table of the logits: a product of quantised numbers.

    `compiler_options` are XLA's, for the step of training. With `vector_products`, a decoded token is multiplied by batches of
    products of a vector with a matrix (`infer/products.py`), which XLA for CPUs computes on all cores.

    `moe_kernel` is blocked, tokamax or auto, which `kernels.experts.choose` resolves for each layer.

    With `statistics` the layers measure themselves (`statistics.py`) in the forward pass of training.
    """

    dtype: jnp.dtype
    remat: Table[str, str]  # by the letter of the layer
    context: Table[str, str]
    zigzag: bool
    kernel: str
    loss_chunk: int
    mlp_chunk: int | None
    unroll: int = 1
    transform: Callable[[dict], dict] = unchanged
    dot: Dot = jax.lax.dot_general
    statistics: bool = False
    compiler_options: tuple[tuple[str, str], ...] = ()
    vector_products: bool = False
    moe_kernel: str = "blocked"

    def mlp_chunks(self, letter: str) -> Chunks | None:
        """The chunks of the feed-forward of a layer type. Without rematerialisation all activations are saved."""
        return None if self.mlp_chunk is None else Chunks(self.mlp_chunk, saves_products=self.remat[letter] == "none")


def execution_on(platform: str, model: Model, train: Train) -> Execution:
    """The `Execution` of `model` that `train` means on a platform ("cpu", "gpu" or "tpu").

    NotImplementedError where the kernel does not run there, or does not give what the choice of remat keeps.
    """
    dtype = ("float32" if platform == "cpu" else "bfloat16") if train.dtype == "auto" else train.dtype
    mlp_chunk = CPU_MLP_CHUNK if train.mlp_chunk is None and platform == "cpu" else train.mlp_chunk
    kernel = kernels.choose(train.kernel, platform)
    remat, schemes = config.remat(model, train), config.context(model, train)
    if not kernels.KERNELS[kernel].saves_outputs and (saving := {"attention", "offload"} & {*remat.values()}):
        others = " or ".join(f'"{name}"' for name, x in kernels.KERNELS.items() if x.saves_outputs and platform in x.platforms)
        raise NotImplementedError(
            f'the kernel "{kernel}" runs again in the backward pass, and train.remat={" and ".join(sorted(saving))} keeps '
            f"its outputs so that it does not; use train.kernel={others}, or remat none or layer"
        )
    options = OVERLAP if train.overlap and platform == "tpu" else ()
    arguments = jnp.dtype(dtype), remat, schemes, train.zigzag, kernel, train.loss_chunk, mlp_chunk, train.unroll
    has_experts = any(model.kinds[letter].mlp.type == "moe" for letter in model.layers)
    moe_kernel = kernels.choose_experts(train.moe_kernel, platform) if has_experts else "blocked"
    others = {"compiler_options": options, "vector_products": platform == "cpu", "moe_kernel": moe_kernel}
    return Execution(*arguments, **others)
