"""Objectives of pairs: their closed forms, sums over packed pairs on every mesh, and runs that train on them."""

import contextlib
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BLOCKED, assert_close, batch_of, mesh_of, on_mesh, random_params, tiny
from flax.traverse_util import flatten_dict
from prepared import pairs_store
from trained import losses, train_until

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.data import chat
from hybrid_attn.model import losses as token_losses
from hybrid_attn.train import loop
from hybrid_attn.train.objectives import objective_of, preference
from hybrid_attn.train.objectives.preference import FORMS, Halves
from hybrid_attn.train.step import abstract_on, abstract_state, begin_stage, init_state, make_step

SETTINGS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1, "nll": 0.2},
    "ipo": {"beta": 0.3},
    "hinge": {"beta": None, "margin": 1.5, "alpha": 0.7},
    "trl_ipo": {"beta": 0.3, "nll": 0.2},
    "trl_hinge": {"beta": 0.3, "mean_log_probs": True},
}
STAGE = {"steps": 4, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
# Pairs of many lengths, in rows of one to three, and a row of padding.
LAYOUTS = "aaaaabbbbbbb", "aaaaaaaaaabbbbbbbbbbbbcccccdddd", "", "aaaabbbccccddddeeeffff"
ROWS = [x.ljust(48, ".") for x in LAYOUTS]
BATCH = batch_of(*ROWS, *ROWS[::-1])
BATCH |= {"bytes": BATCH["weights"]}
BATCH["weights"] = BATCH["weights"] * (BATCH["positions"] > 0)  # the first token after BOS is of the prompt


def config_of(objective="dpo", stages=({},), **changes):
    """A config whose stages have the objective."""
    of_stage = {"objective": objective, "preference": base.preference(**SETTINGS[objective])}
    one_layer = {"model.pattern": "L", "model.num_layers": 1, "train.remat": "none"}
    return tiny(one_layer | {"stages": [STAGE | of_stage | stage for stage in stages]} | changes)


def at_equal(name, **changes):
    """The loss of a pair and its gradient by the log-probability of the chosen completion, where model and reference agree."""
    x = config.Preference(
        **dict.fromkeys(("beta", "margin", "alpha")) | {"label_smoothing": 0.0, "nll": 0.0, "reference": "frozen"} | changes
    )
    reference = Halves(jnp.float32(-7.0), jnp.float32(-7.0))
    return jax.value_and_grad(lambda chosen: FORMS[name].loss(x, reference._replace(chosen=chosen), reference))(-7.0)


def test_losses_of_a_model_that_is_the_reference_are_their_closed_forms():
    value, slope = at_equal("dpo", beta=0.3, mean_log_probs=False)
    assert value == pytest.approx(math.log(2)) and slope == pytest.approx(-0.3 / 2)
    value, slope = at_equal("dpo", beta=0.3, label_smoothing=0.1, mean_log_probs=False)
    assert value == pytest.approx(math.log(2)) and slope == pytest.approx(-0.3 * 0.8 / 2)
    value, slope = at_equal("ipo", beta=0.3, mean_log_probs=False)
    assert value == pytest.approx(1 / 4) and slope == pytest.approx(-0.3)
    value, slope = at_equal("hinge", margin=1.0, alpha=0.5, mean_log_probs=True)
    assert value == pytest.approx(1 + 0.5 * math.log(1 + math.e)) and slope == pytest.approx(-1 - 0.5 * math.e / (1 + math.e))
    value, slope = at_equal("trl_ipo", beta=0.3, mean_log_probs=True)
    assert value == pytest.approx(1 / 0.36) and slope == pytest.approx(-1 / 0.3)
    value, slope = at_equal("trl_hinge", beta=0.3, mean_log_probs=False)
    assert value == pytest.approx(1) and slope == pytest.approx(-0.3)


def by_hand(name, x, model, reference):
    """The loss of a pair, of (chosen, rejected) log-probabilities, by its formula in Python's numbers."""
    delta = (model[0] - reference[0]) - (model[1] - reference[1])
    sigmoid = 1 / (1 + math.exp(-(x.beta or 0) * delta))
    loss = {
        "dpo": lambda: -(1 - x.label_smoothing) * math.log(sigmoid) - x.label_smoothing * math.log(1 - sigmoid),
        "ipo": lambda: (x.beta * delta - 0.5) ** 2,
        "hinge": lambda: (
            max(0, x.margin - (model[0] - model[1])) + x.alpha * math.log(1 + math.exp(1 - (model[0] - reference[0])))
        ),
        "trl_ipo": lambda: (delta - 1 / (2 * x.beta)) ** 2,
        "trl_hinge": lambda: max(0, 1 - x.beta * delta),
    }[name]()
    return loss - x.nll * model[0], delta


def completions(nll_BT, mean):
    """(chosen, rejected) log-probabilities of each pair of `BATCH`, by a loop over documents."""
    found = []
    for b, segments in enumerate(BATCH["segments"]):
        of_row = []
        for segment in range(1, segments.max() + 1):
            chosen = (segments == segment) & (BATCH["weights"][b] > 0)
            of_row.append(-float(nll_BT[b][chosen].mean() if mean else nll_BT[b][chosen].sum()))
        found += zip(of_row[::2], of_row[1::2], strict=True)
    return found


@pytest.fixture(scope="module")
def nll():
    """Those of the tokens of `BATCH` under the model and under a reference, on one device."""
    model = config_of().model
    with jax.set_mesh(mesh_of()):
        score = jax.jit(token_losses, static_argnums=(0, 3))
        return [np.asarray(score(model, random_params(model, seed), on_mesh(BATCH), BLOCKED)[0], np.float64) for seed in (0, 1)]


def measured(c, sizes):
    """Loss, metrics and the norm of the gradient of a first step, with the parameters of seed 0 and the reference of seed 1."""
    with jax.set_mesh(mesh_of(**sizes)):
        state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model, 0))
        state = state._replace(extras={"reference": random_params(c.model, 1)})
        return jax.device_get(make_step(c.at(0), BLOCKED)(state, on_mesh(BATCH))[1])


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(x, marks=pytest.mark.slow) for x in FORMS if x != "dpo")])
def test_a_batch_has_the_mean_over_its_pairs_of_the_formula(name, nll):
    c = config_of(name)
    x, model, reference = c.at(0).preference, *(completions(x, name in ("hinge", "trl_ipo", "trl_hinge")) for x in nll)
    values = [by_hand(name, x, *of_pair) for of_pair in zip(model, reference, strict=True)]
    assert len(values) == 2 * (1 + 2 + 3)
    metrics = measured(c, {})
    assert metrics["loss"] == pytest.approx(np.mean([loss for loss, _ in values]), rel=1e-4)
    assert metrics["log_ratio"] == pytest.approx(np.mean([delta for _, delta in values]), rel=1e-3, abs=1e-4)
    assert metrics["pair_accuracy"] == pytest.approx(np.mean([delta > 0 for _, delta in values]))
    assert metrics["chosen_log_prob"] == pytest.approx(np.mean([chosen for chosen, _ in model]), rel=1e-4)
    assert metrics["rejected_log_prob"] == pytest.approx(np.mean([rejected for _, rejected in model]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, microbatches",
    [pytest.param({"data": 2, "context": 2, "tensor": 2}, 1, marks=pytest.mark.exhaustive), ({"fsdp": 2, "context": 4}, 2)],
    ids=str,
)
def test_a_mesh_and_microbatches_compute_what_one_device_does(sizes, microbatches):
    alone, parts = config_of(), config_of(stages=[{"microbatches": microbatches}])
    assert_close(measured(parts, sizes), measured(alone, {}), 1e-4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return pairs_store(tmp_path_factory.mktemp("pairs"))


def of_store(store, objective="dpo", stages=({},), **changes):
    others = {"data.sources": {"pairs": base.source(store=store)}, "evals.names": (), "optim.lr": 3e-3, "optim.warmup_steps": 0}
    return config_of(objective, stages, **others | {"train.log_every": 1, "train.checkpoint_every": 2} | changes)


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
def test_a_run_prefers_chosen_completions_resumes_and_has_the_stage_before_as_reference(store, tmp_path, capsys):
    first = {"objective": "sft", "preference": None}
    second = {"steps": 6, "trainable": ("periods", "final_norm")}
    changes = {"optim.spike_factor": 3.0, "optim.clip_norm": 1.0, "train.keep": 9}
    c = of_store(store, stages=[first | {"steps": 9}, second], **changes)
    assert loop.train(c, tmp_path / "straight")
    lines = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    of_pairs = [line for line in lines if line["stage"] == 2]
    # The model is the reference in the first step of the stage, and no step is a spike beside those of the other loss.
    assert len(lines) == 15 and not any("skipped" in line for line in lines)
    assert of_pairs[0]["log_ratio"] == 0 and lines[1]["loss"] != lines[0]["loss"]
    assert of_pairs[-1]["log_ratio"] > 0.1 and of_pairs[-1]["pair_accuracy"] > 0.9
    assert "right" in capsys.readouterr().out
    train_until(11, c, tmp_path / "resumed")
    assert loop.train(c, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    folder = tmp_path / "straight/checkpoints"
    assert [checkpoint.extras(folder, step) for step in (8, 15)] == [{"spikes"}, {"spikes", "reference"}]
    trained = {name for name in checkpoint.read_shapes(folder, 15) if name.startswith(second["trainable"])}
    assert checkpoint.read_shapes(folder, 15, "extras/reference").keys() == trained
    for name in ("straight", "resumed"):
        saved = checkpoint.read_data(tmp_path / name / "checkpoints", 15)
        assert checkpoint.chat_template(saved) == chat.load_template(None, "bytes")


def test_the_reference_has_what_its_stage_trains_and_no_other_stage_has_it(one_device):
    adapter = {"model.adapter.type": "lora", "model.adapter.targets": ("*/q",)}
    c = config_of(stages=[{"objective": "sft", "preference": None}, {}, {"trainable": ("final_norm", "embed")}], **adapter)
    names = {"periods/L0/attention/q_adapter/a", "periods/L0/attention/q_adapter/b"}, {"final_norm/weight", "embed"}
    begun = abstract_state(c, one_device)
    assert begun.extras == {}
    for index, expected in enumerate(names, 1):
        begun = abstract_on(one_device, jax.eval_shape(functools.partial(begin_stage, c, index), begun))
        reference = flatten_dict(begun.extras["reference"], sep="/")
        assert reference.keys() == expected
        assert begun.extras == abstract_state(c, one_device, index).extras
    assert jax.eval_shape(functools.partial(begin_stage, c, 0), begun).extras == {}


@pytest.mark.parametrize(
    "objective, settings, message",
    [
        ("dpo", None, r"the objective 'dpo' needs stages\[0\]\.preference; use base\.preference\(beta=\.\.\.\)"),
        ("hinge", {}, r"stages\[0\]\.preference\.beta=0\.1, and the objective 'hinge' does not read it; use None"),
        ("hinge", {"beta": None, "alpha": 1.0}, r"preference\.margin is None, and the objective 'hinge' needs a number"),
        (
            "ipo",
            {"label_smoothing": 0.1},
            r"preference\.label_smoothing=0\.1, and the objective 'ipo' does not read it; use 0\.0",
        ),
        ("hinge", None, r"needs stages\[0\]\.preference; use base\.preference\(margin=\.\.\., alpha=\.\.\., beta=None\)"),
        ("next_token", {}, r"stages\[0\]\.preference is set, and the objective 'next_token' does not read it; use None"),
    ],
)
def test_settings_that_an_objective_lacks_or_does_not_read_are_refused(objective, settings, message):
    made = None if settings is None else base.preference(**settings)
    with pytest.raises(ValueError, match=message):
        objective_of(tiny({"stages": [STAGE | {"objective": objective, "preference": made}]}).at(0))


def test_a_z_loss_is_refused_and_settings_are_what_a_stage_goes_on_with(store):
    with pytest.raises(ValueError, match=r"'dpo' does not read optim\.z_loss=0\.001; give stages\[0\]\.override"):
        objective_of(config_of(**{"optim.z_loss": 1e-3}).at(0))
    identities = []
    for beta in (0.3, 0.4):
        c = of_store(store, stages=[{"preference": base.preference(beta=beta)}])
        identities += loop.load_data(c).identities
    assert [x.pop("preference")["beta"] for x in identities] == [0.3, 0.4] and identities[0] == identities[1]


def test_a_stage_of_an_older_checkpoint_has_a_frozen_reference(store, one_device, tmp_path):
    c = of_store(store)
    identities = loop.load_data(c).identities
    older = identities[0] | {"preference": {k: x for k, x in identities[0]["preference"].items() if k != "reference"}}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, 1, 1)) as checkpoints:
        data = {"stage_steps": [2], "stage": older}
        checkpoints.save(2, jax.jit(init_state, static_argnums=0)(c), data, config.to_dict(c), wait=True)
        assert loop.first_state(c, identities, jax.sharding.get_mesh(), checkpoints)[1] == 2
        other = [identities[0] | {"preference": identities[0]["preference"] | {"reference": "store"}}]
        with pytest.raises(ValueError, match=r"(?s)in the middle of stages\[0\].*\n  preference\.reference: frozen -> store\n"):
            loop.first_state(c, other, jax.sharding.get_mesh(), checkpoints)


def test_documents_that_are_no_pairs_are_refused(corpus):
    c = config_of(**{"data.sources": {"text": base.source(paths=(corpus,))}})
    with pytest.raises(
        ValueError, match=r"stages\[0\]\.objective='dpo' needs pairs, and these data\.sources hold none: text; make"
    ):
        loop.load_data(c)


def test_a_batch_without_pairs_has_no_loss_and_no_gradient(one_device):
    c = config_of()
    nothing = {name: np.zeros_like(x) for name, x in BATCH.items()}
    state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model))
    _, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(nothing))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and preference.weight(c.at(0), on_mesh(nothing)) == 0
