"""Biases of attention and of experts, and the clipped gating, on a mesh and in decoding."""

import jax
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, REFERENCE, assert_close, batch_of, loss_and_grads, mesh_of, on_mesh, random_params, tiny

from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import flops, losses

MIXTURE = {"mlp.type": "moe", "mlp.experts": 6, "mlp.biases": True, "mlp.swiglu_limit": 0.5}
GLOBAL = {"rope_theta": 50.0, "attention_bias": True, "mlp.swiglu_limit": 0.3}  # the bias of keys moves nothing without RoPE
CONFIG = tiny(L={"window": 5, "rope_theta": 100.0, "attention_bias": True} | MIXTURE, G=GLOBAL)


@pytest.mark.slow
def test_a_mesh_computes_the_loss_and_the_gradients_of_one_device():
    results = []
    for sizes, execution in (({}, REFERENCE), ({"fsdp": 2, "context": 2, "tensor": 2}, BLOCKED)):
        with jax.set_mesh(mesh_of(**sizes)):
            params = random_params(CONFIG.model)
            results.append(jax.device_get(loss_and_grads(CONFIG.model, execution, params, on_mesh(BATCH))))
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.slow
def test_decoding_computes_the_forward_pass(one_device):
    params, prompt = random_params(CONFIG.model), list(range(40, 61))
    (answer,) = Engine(params, CONFIG, EngineOptions(chunk=16), execution=BLOCKED).generate([prompt], 6)
    batch = batch_of("a" * (len(prompt) + len(answer.tokens)))
    batch["tokens"][0, : len(prompt) + 6] = [*prompt, *answer.tokens]
    batch["targets"] = np.roll(batch["tokens"], -1)
    nll_BT = np.asarray(jax.jit(losses, static_argnums=(0, 3))(CONFIG.model, params, on_mesh(batch), REFERENCE)[0])
    np.testing.assert_allclose(answer.logprobs, -nll_BT[0, len(prompt) - 1 : len(prompt) + 5], atol=1e-4)


def test_a_token_uses_the_biases_of_its_own_experts():
    plain = tiny(L={"mlp.type": "moe", "mlp.experts": 6})
    biased = tiny(L={"mlp.type": "moe", "mlp.experts": 6, "mlp.biases": True})
    D, F, layers = 32, 48, plain.model.layers.count("L")
    of_one = 2 * F + D
    added = [cost(biased.model) - cost(plain.model) for cost in (flops.parameters, flops.active_parameters)]
    assert added == [layers * (6 + 6 * of_one), layers * (6 + 2 * of_one)]
