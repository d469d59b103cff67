"""Experts by tokamax: what is around its products computes the dense loop, and what it cannot do is refused in a line.

The stand-in for tokamax takes whole tiles alone, and leaves rows of no expert undefined: NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_expert_parallel
from absl import flags
from conftest import BLOCKED, assert_close, random_params, tiny
from flax import nnx
from test_moe import ALL_CASES, ZIGZAG, check_dense_loop, inputs, layer_of, results_on, with_experts

from hybrid_attn import kernels
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.kernels import experts
from hybrid_attn.model import execution_on

TILE = 4
BY_TOKAMAX = BLOCKED._replace(moe_kernel="tokamax")


def plain_tokamax(x, y, load_E, dimensions):
    assert load_E.dtype == jnp.int32 and not any(size % TILE for size in (*x.shape, *y.shape[-2:]))
    product = jax.lax.ragged_dot_general(x, y, load_E, dimensions, precision="highest", preferred_element_type=x.dtype)
    if dimensions.rhs_group_dimensions:
        product = jnp.where(jnp.arange(len(x))[:, None] < load_E.sum(), product, jnp.nan)
    return product


@pytest.fixture
def replaced(monkeypatch):
    monkeypatch.setattr(experts, "_call_tokamax", plain_tokamax)
    monkeypatch.setattr(experts, "MULTIPLE", TILE)
    monkeypatch.setattr(experts, "ROWS", TILE)
    monkeypatch.setattr(experts, "DTYPES", ("float32",))


@pytest.mark.parametrize("case", ALL_CASES)
def test_a_layer_and_its_gradients_are_those_of_a_dense_loop_over_experts(case, one_device, replaced):
    check_dense_loop(case, "tokamax")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, model",
    [
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, with_experts().model, marks=pytest.mark.exhaustive),
        ({"expert": 4, "tensor": 2}, test_expert_parallel.with_experts().model),
    ],
    ids=("every axis but expert", "expert"),
)
def test_a_model_computes_on_every_mesh_what_blocks_compute_on_one_device(sizes, model, replaced):
    expected = results_on({}, model, BLOCKED)
    assert_close(results_on(sizes, model, ZIGZAG._replace(moe_kernel="tokamax")), expected, 1e-5)


@pytest.mark.slow
def test_decoding_computes_what_blocks_compute(one_device, replaced):
    c, prompts = with_experts(), [[5, 6, 7], list(range(40, 61))]
    engines = (Engine(random_params(c.model), c, EngineOptions(chunk=16), execution=x) for x in (BLOCKED, BY_TOKAMAX))
    for expected, answer in zip(*(engine.generate(prompts, 4) for engine in engines), strict=True):
        np.testing.assert_array_equal(answer.tokens, expected.tokens)
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-5)


def test_the_gradient_keeps_nothing_of_the_width_of_an_expert(one_device, replaced):
    _, graph, state = layer_of("tokamax", experts=4, d_ff=512)
    x_BTD, seg_BT = inputs()

    def output(x_BTD):
        return nnx.merge(graph, state)(x_BTD, seg_BT, None)[0]

    residuals = jax.tree.leaves(jax.eval_shape(lambda x_BTD: jax.vjp(output, x_BTD)[1], x_BTD))
    assert residuals and all(x.size < 2 * seg_BT.size * 512 // 2 for x in residuals)


@pytest.mark.parametrize("kernel, platform, expected", [("auto", "cpu", "blocked"), ("blocked", "tpu", "blocked")])
def test_a_cpu_has_blocks_and_blocks_are_everywhere(kernel, platform, expected):
    assert kernels.choose_experts(kernel, platform) == expected


def test_a_named_tokamax_is_refused_on_a_cpu_and_where_it_is_not_installed_and_auto_warns(monkeypatch, caplog):
    c = tiny({"train.moe_kernel": "tokamax"}, G={"mlp.type": "moe"})
    with pytest.raises(NotImplementedError, match=r'^moe_kernel "tokamax" runs on gpu and tpu, not on cpu; use "blocked"$'):
        execution_on("cpu", c.model, c.train)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels.choose_experts.cache_clear()
    with pytest.raises(NotImplementedError, match=r'^moe_kernel "tokamax" needs .* tokamax: pip install "hybrid-attn\[tpu\]"$'):
        kernels.choose_experts("tokamax", "tpu")
    assert kernels.choose_experts("auto", "gpu") == "blocked"
    kernels.choose_experts.cache_clear()
    assert [r.levelname for r in caplog.records if "the product of experts falls back" in r.message] == ["WARNING"]


def test_a_model_without_experts_needs_no_kernel_for_them():
    c = tiny({"train.moe_kernel": "tokamax"})
    assert execution_on("cpu", c.model, c.train).moe_kernel == "blocked"


@pytest.mark.parametrize(
    "is_plain, dtype, sizes, message",
    [
        (True, "float32", (256, 512), "in bfloat16 whose sizes are multiples of 128, and here are float32 and, on each device"),
        (True, "bfloat16", (256, 192), "here are bfloat16 and, on each device, matrices of 256 x 192; use train.moe_kernel="),
        (False, "bfloat16", (256, 512), "as they are, and this execution has a product of its own; use train.moe_kernel="),
    ],
)
def test_what_tokamax_cannot_do_is_refused_by_name_and_auto_warns_and_takes_blocks(is_plain, dtype, sizes, message, caplog):
    with pytest.raises(NotImplementedError) as error:
        experts.choose("tokamax", is_plain, jnp.dtype(dtype), sizes)
    assert message in str(error.value) and "\n" not in str(error.value)
    experts._log.cache_clear()
    assert [experts.choose("auto", is_plain, jnp.dtype(dtype), sizes) for _ in range(2)] == ["blocked"] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_auto_takes_blocks_where_tokamax_has_no_kernel_for_the_device(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("tokamax has no product of experts for this device (Mosaic: Not supported on TPU v4.)")

    monkeypatch.setattr(experts, "_call_tokamax", refuse)
    assert experts.choose("auto", True, jnp.dtype("bfloat16"), (256, 512)) == "blocked"
    with pytest.raises(NotImplementedError, match=r'Not supported on TPU v4\.\); use train.moe_kernel="blocked"'):
        experts.choose("tokamax", True, jnp.dtype("bfloat16"), (256, 512))


@pytest.mark.parametrize(
    "shapes, tiles",
    [
        (((512, 768), (9, 768, 384), False), (768, 384)),
        (((512, 2560), (9, 2560, 1280), False), (1280, 640)),  # in equal parts
        (((512, 384), (9, 768, 384), False), (384, 768)),  # of a transposed matrix
        (((512, 4096), (512, 1536), True), (1024, 768)),
    ],
)
def test_tiles_of_a_tpu_have_equal_parts_of_an_axis(shapes, tiles):
    assert experts.tpu_tiles(*shapes) == (256, *tiles)


@pytest.fixture
def interpreted(request, monkeypatch):
    """tokamax's own kernels for a GPU in Pallas' interpreter: Triton's, for Mosaic's cannot be interpreted."""
    pytest.importorskip("tokamax", reason="tokamax is not installed; make test-aot-gpu installs it")
    from jax.experimental import pallas
    from tokamax._src.ops.ragged_dot import pallas_triton

    if not flags.FLAGS.is_parsed():  # tokamax would parse those of pytest
        flags.FLAGS.mark_as_parsed()
        request.addfinalizer(flags.FLAGS.unparse_flags)
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    monkeypatch.setattr(pallas_triton.PallasTritonRaggedDot, "supported_on", lambda *_: True)


def test_products_of_tokamax_are_those_of_each_expert_and_zeros_where_there_is_none(interpreted):
    rng, load_E = np.random.default_rng(0), np.asarray([0, 130, 0, 250, 0], np.int32)
    x_mA, y_mB, w_EAB = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((512, 128), (512, 256), (5, 128, 256)))
    products = experts.multiplied(x_mA, w_EAB, load_E), experts.multiplied_transposed(y_mB, w_EAB, load_E)
    sums_EAB = experts.summed(x_mA, y_mB, load_E)
    x_mA, y_mB, w_EAB = (x.astype(np.float32) for x in (x_mA, y_mB, w_EAB))
    expected_mB, expected_mA, expected_EAB = (np.zeros(x.shape, np.float32) for x in (y_mB, x_mA, w_EAB))
    for expert, rows in ((1, slice(0, 130)), (3, slice(130, 380))):
        expected_mB[rows], expected_mA[rows] = x_mA[rows] @ w_EAB[expert], y_mB[rows] @ w_EAB[expert].T
        expected_EAB[expert] = x_mA[rows].T @ y_mB[rows]
    assert_close(jax.device_get([*products, sums_EAB]), [expected_mB, expected_mA, expected_EAB], 1e-2)
