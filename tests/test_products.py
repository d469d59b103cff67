"""The products of a decoded token on a CPU, against the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, random_params, tiny

from hybrid_attn.infer import products
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.products import PARTS, in_parts
from hybrid_attn.model import execution_on

# The shapes of a vector and of a matrix, and the dimensions that are contracted: into heads, out of them, and with a table.
CASES = {
    "one dimension": ((1, 1, 256), (256, 4, 64), ((2,), (0,))),
    "two dimensions": ((1, 1, 4, 64), (4, 64, 256), ((2, 3), (0, 1))),
    "a table": ((1, 1, 256), (384, 256), ((2,), (1,))),
}


def arrays_of(case: str, rows: int = 1) -> tuple:
    x_shape, shape, contracted = CASES[case]
    keys = jax.random.split(jax.random.key(0))
    x, weight = (jax.random.normal(key, size) for key, size in zip(keys, ((rows, *x_shape[1:]), shape), strict=True))
    return x, weight, (contracted, ((), ()))


def batch_sizes(function, *arrays) -> list[int]:
    """The number of products in the batch of each dot_general."""
    equations = jax.make_jaxpr(function)(*arrays).eqns
    dots = [eqn for eqn in equations if eqn.primitive is jax.lax.dot_general_p]
    return [int(np.prod([eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][1][0]])) for eqn in dots]


@pytest.mark.parametrize("case", CASES)
def test_a_vector_is_multiplied_in_parts_with_the_same_result(one_device, case):
    x, weight, dimensions = arrays_of(case)
    np.testing.assert_allclose(
        in_parts(x, weight, dimensions), jax.lax.dot_general(x, weight, dimensions), rtol=1e-4, atol=1e-4
    )
    assert batch_sizes(lambda x, weight: in_parts(x, weight, dimensions), x, weight) == [PARTS]


def test_rows_small_matrices_and_other_dtypes_are_multiplied_at_once(one_device):
    x, weight, dimensions = arrays_of("one dimension")
    rows, _, _ = arrays_of("one dimension", rows=2)
    halves = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    for arrays in ((rows, weight), (x, weight[:, :1]), halves):
        assert batch_sizes(lambda x, weight: in_parts(x, weight, dimensions), *arrays) == [1]
        np.testing.assert_array_equal(in_parts(*arrays, dimensions), jax.lax.dot_general(*arrays, dimensions))


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
        *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ({"fsdp": 2}, {"context": 2})),
    ],
)
def test_decoding_with_large_matrices_gives_the_scores_of_the_forward_pass(mesh, monkeypatch):
    monkeypatch.setattr(products, "MIN_SIZE", 1)
    c = tiny({"train.kernel": "reference", "train.dtype": "float32"})
    with jax.set_mesh(mesh_of(**mesh)):
        engine = Engine(random_params(c.model), c, EngineOptions(chunk=16))
        (answer,) = engine.generate([[1, 2, 3]], 4)
        (scores,) = engine.score([[1, 2, 3]], [answer.tokens.tolist()])
    np.testing.assert_allclose(answer.logprobs, scores, atol=1e-5)


def test_a_product_of_the_caller_is_not_replaced():
    c = tiny()
    on_cpu, on_gpu = (execution_on(platform, c.model, c.train) for platform in ("cpu", "gpu"))

    def own(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs)

    assert products.for_one_token(on_cpu).dot is in_parts and products.for_one_token(on_gpu) == on_gpu
    assert products.for_one_token(on_cpu._replace(dot=own)).dot is own
