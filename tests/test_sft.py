"""Supervised fine-tuning: a weighted mean over tokens, or over documents, of the loss of next tokens."""

import jax
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, assert_close, mesh_of, on_mesh, random_params, tiny

from hybrid_attn.model import losses
from hybrid_attn.train.objectives import objective_of
from hybrid_attn.train.step import init_state, make_step

STAGE = {"steps": 4, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
RNG = np.random.default_rng(5)
MASKED = BATCH | {"weights": BATCH["weights"] * (RNG.random(BATCH["weights"].shape) < 0.6)}
MASKED["weights"][0] = 0  # a sequence without a trained token
MASKED |= {"bytes": MASKED["weights"]}


def config_of(**stage):
    layers = {"model.pattern": "L", "model.num_layers": 1, "train.remat": "none"}
    return tiny(layers | {"stages": [STAGE | {"objective": "sft"} | stage]})


def stepped(c, sizes=()):
    with jax.set_mesh(mesh_of(**dict(sizes))):
        state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model))
        state, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(MASKED))
        return jax.device_get((metrics, state.params))


def test_over_tokens_it_is_the_loss_of_next_tokens():
    assert_close(stepped(config_of()), stepped(config_of(objective="next_token")), 0)


@pytest.mark.parametrize(
    "sizes, microbatches",
    [
        ({}, 1),
        pytest.param({"data": 2, "context": 2, "tensor": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"context": 8}, 4, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_over_documents_each_has_the_mean_of_its_trained_tokens(sizes, microbatches):
    c = config_of(average_over="documents", microbatches=microbatches)
    with jax.set_mesh(mesh_of()):
        score = jax.jit(losses, static_argnums=(0, 3))
        nll_BT = np.asarray(score(c.model, random_params(c.model), on_mesh(MASKED), BLOCKED)[0], np.float64)
    means = []
    for row, segments, weights in zip(nll_BT, MASKED["segments"], MASKED["weights"], strict=True):
        for segment in range(1, segments.max() + 1):
            trained = (segments == segment) & (weights > 0)
            means += [row[trained].mean()] if trained.any() else []
    assert len(means) > 8
    metrics, _ = stepped(c, sizes.items())
    assert metrics["loss"] == pytest.approx(np.mean(means), rel=1e-5)


def test_only_it_averages_over_documents():
    with pytest.raises(
        ValueError, match=r"stages\[0\]\.average_over is set, and the objective 'next_token' does not read it; use"
    ):
        objective_of(config_of(objective="next_token", average_over="documents").at(0))
