"""One small layer with experts, attention experts and an adapter: the same on a mesh, and in decoding.

Their own files compare each of them with its definition, with gradients and on more meshes, in slow tests.
"""

import functools

import jax
import numpy as np
from conftest import BLOCKED, ONE_LAYER, assert_close, batch_of, every, mesh_of, on_mesh, random_params, tiny

from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import losses

EXPERTS = {"mixer": "attention_experts", "attention_experts": 2, "mlp.type": "moe", "mlp.experts": 4, "mlp.top_k": 2}
LORA = {"model.adapter.type": "lora", "model.adapter.rank": 2, "model.adapter.targets": ("*/expert0/q", "*/o")}
C = tiny(ONE_LAYER | LORA, L=EXPERTS | {"window": 5, "rope_theta": 100.0})
NEW, PROMPTS = 4, [[5, 6, 7], [*range(40, 61)]]


@functools.cache
def loss_of_tokens():
    return jax.jit(losses, static_argnums=(0, 3))


def negative_log_probs(tokens: tuple[tuple[int, ...], ...], execution=BLOCKED, **sizes):
    """Of each next token of two sequences, on a mesh of these sizes."""
    batch = batch_of(*("a" * len(row) + "." * (32 - len(row)) for row in tokens))
    for row, of_row in zip(batch["tokens"], tokens, strict=True):
        row[: len(of_row)] = of_row
    batch["targets"] = np.roll(batch["tokens"], -1, 1)
    with jax.set_mesh(mesh_of(**sizes)):
        return np.asarray(loss_of_tokens()(C.model, random_params(C.model), on_mesh(batch), execution)[0]) * batch["weights"]


def test_a_mesh_that_splits_experts_tokens_and_heads_computes_what_one_device_does():
    rows = tuple(tuple(np.random.default_rng(i).integers(0, 384, 32).tolist()) for i in range(2))
    split = negative_log_probs(rows, BLOCKED._replace(context=every("halo")), expert=2, context=2, tensor=2)
    assert_close(split, negative_log_probs(rows), 1e-5)


def test_decoding_computes_the_forward_pass(one_device):
    answers = Engine(random_params(C.model), C, EngineOptions(chunk=16), execution=BLOCKED).generate(PROMPTS, NEW)
    rows = tuple((*prompt, *answer.tokens.tolist()) for prompt, answer in zip(PROMPTS, answers, strict=True))
    for prompt, answer, nll_T in zip(PROMPTS, answers, negative_log_probs(rows), strict=True):
        before = len(prompt) - 1
        np.testing.assert_allclose(answer.logprobs, -nll_T[before : before + NEW], atol=1e-4)
