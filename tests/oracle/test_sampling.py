"""Against the filters of the library that most users of sampling know."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.generation import logits_process  # noqa: E402

from hybrid_attn.infer.sampling import Sampling, filtered  # noqa: E402

WARPERS = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 17},
        {"temperature": 1.3, "top_p": 0.83},
        {"temperature": 0.8, "min_p": 0.04},
        {"temperature": 1.7, "top_k": 90, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_the_distributions_are_those_of_transformers(options):
    logits_BV = np.random.default_rng(0).normal(scale=3, size=(7, 211)).astype(np.float32)
    theirs = torch.tensor(logits_BV)
    for name, value in options.items():
        theirs = WARPERS[name](value)(None, theirs)
    ours = filtered(jnp.asarray(logits_BV), Sampling(**options))
    np.testing.assert_array_equal(np.isfinite(ours), torch.isfinite(theirs))
    np.testing.assert_allclose(
        torch.softmax(torch.tensor(np.asarray(ours)), -1), torch.softmax(theirs, -1), rtol=1e-4, atol=1e-7
    )
