"""Products of the rows of experts with their matrices by tokamax, and which program computes the experts of a layer.

tokamax has a grouped matmul for TPUs (megablox: arXiv 2211.15841), and for GPUs one in Mosaic, for Hopper and Blackwell, beside
one in Triton. Rows are sorted by expert, and those of no expert come last: what tokamax leaves of these is undefined, and
here they are zeros, as are sums over no rows.

Letters: m rows, E experts, A and B the axes of a matrix; D model, F width of an expert on one device.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend

PLATFORMS = "gpu", "tpu"  # of tokamax; blocks are computed everywhere
MULTIPLE = 128  # of D and F: the Mosaic kernels compute whole tiles
ROWS = 256  # of which m is a multiple, and rows of a tile on a TPU
DTYPES = ("bfloat16",)
CONTRACTED = {"A": (1, 1), "B": (1, 2), "m": (0, 0)}  # the axes of the two factors that are summed over
# Nearly all that tokamax has tuned for an H100 have these tiles, in place of 64 rows and two stages.
HOPPER = {"block_m": 128, "block_n": 64, "block_k": 128, "num_stages": 4, "split_k": 1, "persistent": False, "grid_block_n": 4}
TRITON = {"block_m": 128, "block_n": 128, "block_k": 32, "num_warps": 4, "num_stages": 4}


def choose(kernel: str, is_plain: bool, dtype: jnp.dtype, sizes: tuple[int, int]) -> str:
    """The program for a layer whose experts have matrices [D, F] on a device, `sizes`: "blocked" or "tokamax".

    `kernel` is one of these or "auto", which means tokamax where it can compute the layer; it is logged once.
    NotImplementedError where a named tokamax cannot.
    """
    if kernel == "blocked":
        return kernel
    problem = _problem(is_plain, str(dtype), sizes)
    if problem and kernel == "tokamax":
        raise NotImplementedError(f'{problem}; use train.moe_kernel="blocked"')
    _log(f"experts by blocks: {problem}" if problem else "experts by tokamax", logging.WARNING if problem else logging.INFO)
    return "blocked" if problem else "tokamax"


def _problem(is_plain: bool, dtype: str, sizes: tuple[int, int]) -> str | None:
    """Why tokamax cannot compute experts, with the numbers."""
    if not is_plain:
        return "tokamax multiplies with the matrices of experts as they are, and this execution has a product of its own"
    if dtype not in DTYPES or any(size % MULTIPLE for size in sizes):
        here = f"{dtype} and, on each device, matrices of {sizes[0]} x {sizes[1]}"
        return f"tokamax takes experts in {' or '.join(DTYPES)} whose sizes are multiples of {MULTIPLE}, and here are {here}"
    try:
        x_mD, w_EDF = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((ROWS, sizes[0]), (1, *sizes)))
        load_E = jax.ShapeDtypeStruct((1,), jnp.int32)
        jax.eval_shape(lambda x, w, load: summed(x, multiplied(x, w, load), load), x_mD, w_EDF, load_E)
    except NotImplementedError as error:
        return str(error)
    return None


@functools.cache
def _log(message: str, level: int) -> None:
    logging.getLogger(__name__).log(level, message)


def multiplied(x_mA: jax.Array, w_EAB: jax.Array, load_E: jax.Array) -> jax.Array:
    """Each row times the matrix of its expert, [m, B]; the first `load_E` rows are those of expert 0, and so on."""
    return _of_experts(_product("A", x_mA, w_EAB, load_E), load_E)


def multiplied_transposed(x_mB: jax.Array, w_EAB: jax.Array, load_E: jax.Array) -> jax.Array:
    """Each row times the transposed matrix of its expert, [m, A]."""
    return _of_experts(_product("B", x_mB, w_EAB, load_E), load_E)


def summed(x_mA: jax.Array, y_mB: jax.Array, load_E: jax.Array) -> jax.Array:
    """The outer products of the rows of each expert, summed, [E, A, B]; rows of no expert must be finite."""
    return jnp.where(load_E[:, None, None] > 0, _product("m", x_mA, y_mB, load_E), 0)


def _of_experts(x_mA: jax.Array, load_E: jax.Array) -> jax.Array:
    """`x_mA` with zeros in rows of no expert."""
    return jnp.where(jnp.arange(len(x_mA))[:, None] < load_E.sum(), x_mA, 0)


def _product(contracted: str, x: jax.Array, y: jax.Array, load_E: jax.Array) -> jax.Array:
    left, right = CONTRACTED[contracted]
    groups, scope = ([], "sums of experts") if contracted == "m" else ([0], "products of experts")
    with jax.named_scope(scope):
        return _call_tokamax(x, y, load_E, jax.lax.RaggedDotDimensionNumbers((([left], [right]), ([], [])), [0], groups))


def _call_tokamax(x: jax.Array, y: jax.Array, load_E: jax.Array, dimensions: jax.lax.RaggedDotDimensionNumbers) -> jax.Array:
    """The ragged product, in the dtype of `x`, of the first kernel that supports the device and the arguments."""
    errors = []
    for name, op in _kernels(x.shape, y.shape, not dimensions.rhs_group_dimensions).items():
        try:
            arguments = {"group_sizes": load_E, "ragged_dot_dimension_numbers": dimensions, "preferred_element_type": x.dtype}
            return op(x, y, **arguments)
        except NotImplementedError as error:
            errors.append(f"{name}: {error}")
    raise NotImplementedError(f"tokamax has no product of experts for this device ({'; '.join(errors)})")


def _kernels(x_shape: tuple[int, ...], y_shape: tuple[int, ...], sums_rows: bool) -> dict[str, Any]:
    """tokamax's kernels for a product, the best first.

    On a Hopper GPU, by the times that tokamax has on record for an H100 (0.0.12; 393,216 rows, 128 experts of 2048 x 768), that
    is Mosaic for rows times matrices, 452 TFLOP/s beside 363, but Triton for sums over rows, 655 beside 106.
    """
    from tokamax._src import gpu_utils
    from tokamax._src.ops.ragged_dot import api, pallas_mosaic_gpu, pallas_mosaic_tpu, pallas_triton

    if backend.get_default_device().platform == "tpu":
        names = "tile_m", "tile_k", "tile_n"
        config = pallas_mosaic_tpu.Config(**dict(zip(names, tpu_tiles(x_shape, y_shape, sums_rows), strict=True)))
        return {"Mosaic": api.IMPLEMENTATIONS["mosaic_tpu"].replace(config=config)}
    config = pallas_mosaic_gpu.Config(**HOPPER) if gpu_utils.is_sm90() else None
    mosaic = {"Mosaic": api.IMPLEMENTATIONS["mosaic_gpu"].replace(config=config)}
    triton = {"Triton": api.IMPLEMENTATIONS["triton"].replace(config=pallas_triton.Config(**TRITON))}
    return triton | mosaic if sums_rows else mosaic | triton


def tpu_tiles(x_shape: tuple[int, ...], y_shape: tuple[int, ...], sums_rows: bool) -> tuple[int, int, int]:
    """Rows, columns of the first factor and columns of the result in a tile: about as many as VMEM holds, in equal parts.

    tokamax has 128 of each for sizes that it has not tuned, with which a TPU waits for its memory.
    """
    first = x_shape[1]
    result = y_shape[-1] if sums_rows or y_shape[1] == first else y_shape[1]
    most = (1024, 1024) if sums_rows else (2048, 1024)
    tiles = (-(-size // -(-size // limit)) for size, limit in zip((first, result), most, strict=True))
    return ROWS, *(-(-size // MULTIPLE) * MULTIPLE for size in tiles)
