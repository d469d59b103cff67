"""Merges of models: the formulas against plain loops, and the program on checkpoints."""

import jax
import numpy as np
import pytest
from conftest import random_params, tiny, tool
from test_loading import save

from hybrid_attn import checkpoint, config, merge
from hybrid_attn.infer import loading
from hybrid_attn.merge import Recipe, decay_weights

RNG = np.random.default_rng(0)
BASE, *MODELS = (RNG.normal(size=(5, 7)).astype(np.float32) for _ in range(4))


def merged(recipe, tensors=MODELS, base=BASE, seed=0):
    return merge.merge(recipe, tensors, base, np.random.default_rng(seed))


@pytest.mark.parametrize("method", merge.METHODS)
def test_equal_models_of_which_nothing_is_dropped_merge_to_themselves(method):
    most = merge.METHODS[method].most or 3
    recipe = Recipe(method, tuple(RNG.uniform(0.1, 2, most)), t=0.3, density=1.0)
    np.testing.assert_array_equal(merged(recipe, [MODELS[0]] * most), MODELS[0])


def test_a_linear_merge_is_the_mean_by_weights():
    a, b, c = MODELS
    np.testing.assert_allclose(merged(Recipe("linear", (1, 2, 5))), (a + 2 * b + 5 * c) / 8, rtol=1e-6)


def test_slerp_turns_from_the_first_model_to_the_second_and_keeps_their_length():
    a, b = (x / np.linalg.norm(x) for x in MODELS[:2])
    steps = [merged(Recipe("slerp", (1, 1), t=t), [a, b]) for t in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(steps[0], a, rtol=1e-6)
    np.testing.assert_allclose(steps[-1], b, rtol=1e-6)
    np.testing.assert_allclose([np.linalg.norm(x) for x in steps], 1, rtol=1e-6)
    angles = [np.arccos(np.sum(x * y)) for x, y in zip(steps, steps[1:], strict=False)]
    np.testing.assert_allclose(angles, angles[0], rtol=1e-3)


def test_slerp_of_parallel_and_of_zero_tensors_is_a_line():
    recipe = Recipe("slerp", (1, 1), t=0.25)
    np.testing.assert_allclose(merged(recipe, [BASE, 3 * BASE]), 1.5 * BASE, rtol=1e-6)
    np.testing.assert_allclose(merged(recipe, [0 * BASE, BASE]), 0.25 * BASE, rtol=1e-6)


def test_ties_averages_the_largest_differences_that_have_the_elected_sign():
    weights, density, scale = (1.0, 2.0, 0.5), 0.4, 1.5
    differences = [(x - BASE).astype(np.float64).reshape(-1) for x in MODELS]
    for x in differences:
        x[np.argsort(-abs(x))[round(density * x.size) :]] = 0
    expected = BASE.reshape(-1).astype(np.float64)
    for i in range(expected.size):
        values = [x[i] for x in differences]
        sign = np.sign(sum(w * v for w, v in zip(weights, values, strict=True)))
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        if agreeing:
            expected[i] += scale * sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing)
    actual = merged(Recipe("ties", weights, density=density, scale=scale))
    np.testing.assert_allclose(actual.reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_dare_keeps_a_share_of_each_difference_and_its_mean():
    base, model = np.zeros((400, 500), np.float32), RNG.normal(size=(400, 500)).astype(np.float32)
    actual = merged(Recipe("dare", (1,), density=0.25), [model], base)
    kept = actual != 0
    assert np.mean(kept) == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(actual[kept], 4 * model[kept], rtol=1e-6)
    assert np.any(actual != merged(Recipe("dare", (1,), density=0.25), [model], base, seed=1))


def test_weights_for_a_decay_give_each_update_the_rate_of_its_end():
    rate = {"linear": lambda x: 1 - x, "sqrt": lambda x: 1 - x**0.5, "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2}
    for decay, function in rate.items():
        weights = decay_weights(decay, 4)
        of_updates = [sum(weights[i:]) for i in range(4)]
        np.testing.assert_allclose(of_updates, [function(i / 4) for i in range(4)], rtol=1e-12)
    np.testing.assert_allclose(decay_weights("linear", 4), 0.25)


@pytest.mark.parametrize(
    "recipe, message",
    [
        (("slerp", (1, 1, 1)), "slerp merges 2 models, not 3"),
        (("linear", (1, -1)), "sum to 0"),
        (("linear", (1, np.nan)), "must be finite"),
        (("ties", (1,), 0.5, 0.0), "density=0.0 must lie above 0"),
        (("slerp", (1, 1), 1.5), "t=1.5 must lie between 0"),
    ],
)
def test_a_recipe_that_is_none_is_an_error(recipe, message):
    with pytest.raises(ValueError, match=message):
        Recipe(*recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save(workdir / "checkpoints", tiny(), steps=(3, 5, 7), chat_template="mine")
    return workdir


def merge_with(*arguments):
    with tool("merge") as program:
        program.flags.FLAGS(["merge", *arguments])
        program.merge_models()


def test_the_newest_checkpoints_of_a_run_merge_to_their_mean_and_the_result_loads(run, tmp_path, capsys, one_device):
    merge_with(f"--checkpoint={run}", "--last=2", f"--out={tmp_path / 'out'}")
    loaded = loading.load(tmp_path / "out")
    expected = jax.tree.map(
        lambda a, b: ((np.float64(a) + np.float64(b)) / 2).astype(np.float32), *(random_params(tiny().model, s) for s in (5, 7))
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    data = checkpoint.read_data(tmp_path / "out")
    assert loading.chat_template(tmp_path / "out", 0) == "mine"
    assert data["stage_steps"] == [7] and [x["step"] for x in data["merge"]["models"]] == [5, 7]
    assert data["merge"]["models"][1]["fingerprint"] == checkpoint.fingerprint(run / "checkpoints", 7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"  0.5000  {run}/checkpoints/5" and lines[-1].endswith("out: linear merge of 2 checkpoints")


def test_models_merge_onto_their_base_layer_by_layer(run, tmp_path, one_device):
    models = [f"--checkpoint={run}/checkpoints/{step}" for step in (5, 7)]
    merge_with(*models, f"--base={run}/checkpoints/3", "--method=ties", "--density=0.3", f"--out={tmp_path / 'out'}")
    base, *tensors = (np.asarray(random_params(tiny().model, s)["periods"]["L0"]["attention"]["q"][0]) for s in (3, 5, 7))
    expected = merge.merge(Recipe("ties", (1, 1), density=0.3), tensors, base, np.random.default_rng(0))
    np.testing.assert_array_equal(loading.load(tmp_path / "out").params["periods"]["L0"]["attention"]["q"][0], expected)


def test_a_moving_average_becomes_a_model(tmp_path, one_device):
    c = tiny({"optim.ema_half_life": 0.5})
    ema, params = random_params(c.model, 1), random_params(c.model, 2)
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep=1, every=1)
    checkpoints.save(4, {"params": params, "extras": {"ema": ema}}, {"stage_steps": [4], "stage": {}}, config.to_dict(c))
    checkpoints.close()
    merge_with(f"--checkpoint={tmp_path / 'run'}", "--ema", f"--out={tmp_path / 'out'}")
    jax.tree.map(np.testing.assert_array_equal, loading.load(tmp_path / "out").params, ema)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--last=1", "--ema"], "has no moving average; a run with optim.ema_half_life keeps one"),
        (["--last=9"], "--last=9: .* has 3 checkpoints"),
        (["--steps=3,x"], "--steps=3,x must be numbers"),
        (["--steps=3,4"], "has no complete checkpoint of step 4"),
        (["--last=2", "--steps=3"], "give one of them"),
        (["--last=3", "--weights=1,2"], "--weights has 2 numbers for 3 models"),
        (["--last=2", "--weights=1,2", "--decay=sqrt"], "--weights and --decay both give weights"),
        (["--steps=7,3"], "--steps=7,3 must increase"),
        (["--steps=3,3"], "--steps=3,3 must increase"),
        (["--decay=sqrt"], "--decay is of the checkpoints of one run"),
        (["--last=2", "--t=0.5"], "--t does not belong to --method=linear"),
        (["--last=2", "--method=ties"], "--method=ties needs --base"),
        (["--last=3", "--method=slerp"], "slerp merges 2 models, not 3"),
    ],
)
def test_wrong_flags_write_nothing(run, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_with(f"--checkpoint={run}", *arguments, f"--out={tmp_path / 'out'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, tokenizer, message",
    [
        ({"model.d_ff": 32}, "bytes", r"other parameters: periods/G1/mlp/down: \(1, 48, 32\) -> \(1, 32, 32\)"),
        ({"model.num_layers": 3}, "bytes", "other parameters: tail/L0/attention/k: none -> "),
        ({}, "another", "were trained with different tokenizers"),
    ],
)
def test_models_of_other_shapes_or_tokenizers_are_not_merged(run, tmp_path, changes, tokenizer, message):
    save(tmp_path / "other", tiny(changes), tokenizer, steps=(1,))
    with pytest.raises(ValueError, match=message):
        merge_with(f"--checkpoint={run}", f"--checkpoint={tmp_path / 'other'}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_fields_of_the_model_that_differ_are_printed(run, tmp_path, capsys, one_device):
    save(tmp_path / "other", tiny(L={"window": 7, "rope_theta": 100.0}), steps=(1,))
    merge_with(f"--checkpoint={run}", f"--checkpoint={tmp_path / 'other'}", f"--out={tmp_path / 'out'}")
    assert f"{tmp_path}/other/1: model.kinds.L.window: 5 -> 7" in capsys.readouterr().out
