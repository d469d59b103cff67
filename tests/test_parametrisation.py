"""µP and depth: what a wider or deeper model starts from, how fast its weights move, and that its activations stay level."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import assert_close, everything, mesh_of, tiny, tool
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Piece, output_scale
from hybrid_attn.convert import families
from hybrid_attn.model import init, logits, specs
from hybrid_attn.model.loss import token_losses
from hybrid_attn.model.params import MATRIX, ParamSpec
from hybrid_attn.programs import parse
from hybrid_attn.train.optim import OPTIMISERS
from hybrid_attn.train.schedule import schedule

MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}
BRANCH_ENDS = {"o", "down"}


def changed(changes):
    """The factor on the standard deviation and on the rate of each weight, by the last part of its name."""
    model = dataclasses.replace(everything("LG", 5), tie_embeddings=False)
    factors = {}
    for old, new in zip(*(jax.tree.leaves(specs(x)) for x in (model, dataclasses.replace(model, **changes))), strict=True):
        assert old.rate == 1.0 and (old.shape, old.axes, old.group) == (new.shape, new.axes, new.group)
    flat = flatten_dict(specs(dataclasses.replace(model, **changes)))
    for path, spec in flat.items():
        std = flatten_dict(specs(model))[path].std
        factors.setdefault(path[-1], set()).add((spec.std / std if std else 1.0, spec.rate))
    return {name: found.pop() if len(found) == 1 else found for name, found in factors.items()}


def test_a_model_four_times_as_wide_has_matrices_half_as_large_that_move_a_quarter_as_fast():
    factors = changed({"mup_base_width": 8})  # of d_model=32
    assert MATRICES < factors.keys() and {"embed", "unembed", "weight", "sink", "temperature"} < factors.keys()
    assert factors == {name: (0.5, 0.25) if name in MATRICES else (1.0, 1.0) for name in factors}


def test_depth_makes_the_ends_of_branches_smaller_and_nothing_else():
    by_base = changed({"mup_base_depth": 1})  # of 2 layers
    assert by_base == {name: (0.5, 0.5) if name in BRANCH_ENDS else (1.0, 1.0) for name in by_base}
    gpt2 = changed({"depth_init": True})
    assert gpt2 == {name: (0.5, 1.0) if name in BRANCH_ENDS else (1.0, 1.0) for name in gpt2}  # 1 / sqrt(2 x 2)


def test_the_table_of_the_logits_starts_with_its_own_standard_deviation(one_device):
    untied = {"model.tie_embeddings": False}
    start = jax.jit(init, static_argnums=0)
    plain, zero, small = (
        start(tiny(untied | changes).model, jax.random.key(3))
        for changes in ({}, {"model.unembed_init_std": 0.0}, {"model.unembed_init_std": 0.02})
    )
    assert not zero["unembed"].any() and 0.079 < plain["unembed"].std() < 0.081
    np.testing.assert_allclose(small["unembed"], plain["unembed"] / 4, rtol=1e-5)
    assert all((x["embed"] == plain["embed"]).all() for x in (zero, small))


def test_initial_values_are_those_without_multipliers_times_the_factor_of_their_spec():
    plain = tiny({"model.pattern": "L", "model.num_layers": 1}).model
    scaled = dataclasses.replace(plain, mup_base_width=8, mup_base_depth=2)
    with jax.set_mesh(mesh_of(fsdp=2)):
        start = jax.jit(init, static_argnums=0)
        before, after = (flatten_dict(start(model, jax.random.key(3))) for model in (plain, scaled))
    for path, spec in flatten_dict(specs(scaled)).items():
        std = flatten_dict(specs(plain))[path].std
        np.testing.assert_allclose(after[path], before[path] * (spec.std / std if std else 1.0), rtol=1e-6, err_msg=str(path))


def test_at_the_width_and_depth_of_the_base_nothing_differs():
    plain = tiny().model
    based = dataclasses.replace(plain, mup_base_width=plain.d_model, mup_base_depth=plain.num_layers)
    assert specs(based) == specs(plain) and output_scale(based) == output_scale(plain)


def test_logits_and_losses_of_a_wider_model_are_those_of_a_smaller_logit_scale(one_device):
    wide, scaled = (tiny({"model.logit_scale": scale}).model for scale in (3.0, 0.75))
    wide, rng = dataclasses.replace(wide, mup_base_width=8), np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(2, 7, 32)), jnp.float32)
    table_VD = jnp.asarray(rng.normal(size=(384, 32)), jnp.float32, out_sharding=P("tensor", "fsdp"))
    targets_BT = jnp.asarray(rng.integers(0, 384, (2, 7)), jnp.int32)
    for of in (
        lambda model: logits(model, {"embed": table_VD}, x_BTD),
        lambda model: token_losses(model, table_VD, x_BTD, targets_BT, 5),
    ):
        assert_close(jax.jit(of, static_argnums=0)(wide), jax.jit(of, static_argnums=0)(scaled), 1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_update_is_times_the_rate_of_its_weight_and_its_decay_and_state_are_not(name):
    shapes = {"up": ((8, 24), ("embed", "mlp")), "q": ((8, 4, 2), ("embed", "heads", "head_dim"))}
    expected = {"up": 0.5 if name == "muon" else 0.25, "q": 0.25, "embed": 1.0}
    optim, rng = dataclasses.replace(tiny().optim, lr=0.1, weight_decay=0.0, warmup_steps=0), np.random.default_rng(0)

    def update(width, weight_decay):
        leaves = {key: ParamSpec(shape, axes, MATRIX, 1.0, 1, width=width) for key, (shape, axes) in shapes.items()}
        leaves["embed"] = ParamSpec((6, 8), ("vocab", "embed"), "embedding", 1.0, 0)
        decaying = dataclasses.replace(optim, weight_decay=weight_decay)
        tx = OPTIMISERS[name](decaying, leaves, schedule(optim, [Piece(10, None)]))
        put = {key: jnp.asarray(gradients[key], out_sharding=spec.sharding) for key, spec in leaves.items()}
        params = jax.tree.map(jnp.ones_like, put)
        return jax.jit(tx.update)(put, tx.init(params), params)

    gradients = {key: rng.normal(size=shape).astype(np.float32) for key, (shape, _) in shapes.items()}
    gradients["embed"] = rng.normal(size=(6, 8)).astype(np.float32)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
        (plain, state), (wide, wide_state), (decayed, _) = update(1.0, 0.0), update(4.0, 0.0), update(4.0, 0.5)
    assert_close(wide, {key: factor * np.asarray(plain[key]) for key, factor in expected.items()}, 1e-6)
    assert_close(wide_state, state, 0.0)
    assert_close(decayed, {key: np.asarray(x) - (0.05 if key != "embed" else 0.0) for key, x in wide.items()}, 1e-5)


def test_an_export_has_the_scale_of_the_logits_that_the_model_has():
    changes = {"model.logit_scale": 0.5, "model.mup_base_width": 8, "model.kinds.G.rope_theta": None}
    model = tiny(changes, L={"window": 5, "rope_theta": 100.0}).model
    read = families.model_of(families.config_json(model, "cohere2", 64))
    assert read.logit_scale == 0.125 == output_scale(read) and read.mup_base_width is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block": "post", "mup_base_depth": 2},
            "mup_base_depth=2 make.*model.block='post' undoes that; use the",
        ),
        ({"block": "sandwich", "depth_init": True}, "depth_init=True make.*model.block='sandwich' undoes that"),
        ({"depth_init": True, "mup_base_depth": 2}, "mup_base_depth=2 and model.depth_init=True both .*; use one of them$"),
        ({"unembed_init_std": 0.0}, r"unembed_init_std=0\.0 is of a model with its own .*; set model\.tie_embeddings=False$"),
        ({"mup_base_width": 0}, "mup_base_width=0 must be at least 1"),
    ],
    ids=str,
)
def test_a_scaling_that_would_do_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny({f"model.{name}": value for name, value in changes.items()})


CONFIG = """
from configs import mup

def get_config():
    c = mup.get_config()
    c.model.update(d_model=32, mup_base_width=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=96)
    c.data.sources.text.paths = ("{corpus}",)
    return c
"""


@pytest.fixture(scope="module")
def program():
    with tool("coordinate_check") as module:
        yield module


@pytest.mark.slow  # eight programs are compiled
def test_activations_stay_level_over_the_width_with_mup_and_grow_without(program, corpus, tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus))
    flags = [
        f"--config={tmp_path}/c.py",
        "--widths=32,128",
        "--steps=3",
        "--config.optim.lr=3e-3",
        "--config.stages[0].batch=8",
        f"--out={tmp_path}/check.svg",
    ]
    with flagsaver.flagsaver():
        program.main(parse(["coordinate_check.py", *flags])[:1])
    assert (tmp_path / "check.svg").read_bytes().startswith(b"<?xml")
    ratios = re.findall(r"\| residual stream .* (\S+) \|$", capsys.readouterr().out, re.MULTILINE)
    standard, mup = map(float, ratios)
    assert mup < 1.2 and standard > 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--widths=33", "--widths: model.num_heads=4 of model.d_model=64 would be 2.062 at width 33; use multiples of 64"),
        ("--out=check.gif", "--out=check.gif must end in .png or .svg"),
        ("--out=nowhere/check.svg", "nowhere is no directory; make it first"),
    ],
)
def test_wrong_flags_are_one_line(program, flag, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        program.main(parse(["coordinate_check.py", "--out=check.svg", flag])[:1])
    assert ended.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())
