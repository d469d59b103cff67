"""A step with a spike takes no update: parameters and moments keep their bits, and too many in a row end the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, ONE_LAYER, mesh_of, on_mesh, tiny

from hybrid_attn.train import loop, spikes
from hybrid_attn.train.step import init_state, make_step, skip_step

CHANGES = ONE_LAYER | {"optim.spike_factor": 3.0, "optim.warmup_steps": 0, "optim.ema_half_life": 0.1}


def with_weight(factor):
    """The batch; its loss is multiplied by adding weight that its divisor does not have."""
    return on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"]), "weights": BATCH["weights"] * np.float32(factor)})


@pytest.fixture(scope="module")
def run():
    """A config, its step, the state after eight ordinary steps, on the host, and its shardings."""
    c = tiny(CHANGES)
    with jax.set_mesh(mesh_of()):
        state, step = jax.jit(init_state, static_argnums=0)(c), make_step(c.at(0), BLOCKED)
        for _ in range(spikes.MIN_VALUES):
            state, metrics = step(state, with_weight(1))
            assert metrics["consecutive_spikes"] == 0
        yield c, step, jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)


def judged(changes, losses, norms):
    """Which of the steps with these losses and gradient norms are spikes, and the history after them."""
    optim = tiny(CHANGES | changes).optim
    history, results = spikes.HISTORY.init({}), []
    for loss, norm in zip(losses, norms, strict=True):
        is_spike, history = spikes.judge(optim, history, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)})
        results.append(bool(is_spike))
    return results, history


@pytest.mark.parametrize("spike", [(7.0, 1.0), (2.0, 3.5), (np.nan, 1.0), (2.0, np.inf)], ids=str)
def test_a_spike_is_far_above_the_median_or_not_finite(spike):
    losses, norms = [2.0] * 8 + [spike[0], 2.2], [1.0] * 8 + [spike[1], 1.1]
    results, history = judged({}, losses, norms)
    assert results == [False] * 8 + [True, False]
    assert history["consecutive"] == 0


def test_before_a_median_is_known_only_what_is_not_finite_is_a_spike():
    results, _ = judged({}, [1.0, 100.0, np.nan, 1.0], [1.0] * 4)
    assert results == [False, False, True, False]


def test_a_level_that_stays_becomes_the_median():
    results, _ = judged({}, [1.0] * 8 + [10.0] * 11, [1.0] * 19)
    assert results == [False] * 8 + [True] * 8 + [False] * 3


@pytest.mark.parametrize("planted", ["nan", "spike"])
def test_after_a_spike_the_state_is_that_of_a_skipped_step(run, planted):
    _, step, before, shardings = run
    batch = with_weight(1)
    if planted == "nan":
        batch = batch | {"weights": batch["weights"] * jnp.nan}
    else:  # the losses before were a tenth of this one
        last = {name: before.extras["spikes"][name] / 10 for name in spikes.VALUES}
        before = before._replace(extras=before.extras | {"spikes": before.extras["spikes"] | last})
    with jax.set_mesh(mesh_of()):
        after, metrics = step(jax.device_put(before, shardings), batch)
        expected = skip_step(jax.device_put(before, shardings))
    after, expected = jax.device_get((after, expected))
    assert metrics["consecutive_spikes"] == 1 and np.isfinite(metrics["param_norm"])
    jax.tree.map(np.testing.assert_array_equal, after._replace(extras={}), expected._replace(extras={}))
    jax.tree.map(np.testing.assert_array_equal, after.extras["ema"], before.extras["ema"])
    assert after.extras["spikes"]["consecutive"] == 1


def test_an_average_halves_over_a_share_of_the_steps_done(run):
    c, step, _, _ = run
    with jax.set_mesh(mesh_of()):
        state = jax.jit(init_state, static_argnums=0)(c)
        average = jax.device_get(state.params["embed"])
        for number in range(1, 6):
            state, _ = step(state, with_weight(1))
            decay = 0.5 ** (1 / (0.1 * number))
            average = decay * average + (1 - decay) * np.asarray(state.params["embed"])
        np.testing.assert_allclose(state.extras["ema"]["embed"], average, rtol=1e-5, atol=1e-7)


def poisoned(monkeypatch, bad):
    """Batches of the steps `bad`, numbered from 1, have weights that are NaN."""
    batches = loop.pipeline.batches

    def with_nan(*arguments):
        for step, batch in batches(*arguments):
            yield step, batch | {"weights": batch["weights"] * jnp.nan} if step + 1 in bad else batch

    monkeypatch.setattr(loop.pipeline, "batches", with_nan)


def config_of(corpus, most):
    stage = {"steps": 8, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
    changes = {"data.sources.text.paths": (corpus,), "evals.names": (), "stages": [stage], "optim.max_consecutive_spikes": most}
    return tiny(CHANGES | changes | {"train.checkpoint_every": 2, "train.log_every": 1})


@pytest.mark.slow
def test_a_run_goes_on_after_spikes_and_ends_after_too_many_whose_flag_passes_over_the_others(
    corpus, tmp_path, monkeypatch, capsys, known_peak_and_no_pictures
):
    poisoned(monkeypatch, {1, 3, 4, 5, 6})
    c = config_of(corpus, 2)
    with pytest.raises(FloatingPointError, match="steps 3 to 5 are spikes .* step 4 is kept; .*--skip_steps=5:5"):
        loop.train(c, str(tmp_path))
    assert loop.train(c, str(tmp_path), skip_steps=[(5, 5)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped:" in line]
    assert [line.split()[1] for line in lines] == ["1/8", "3/8", "4/8", "5/8", "5/8", "6/8"]
