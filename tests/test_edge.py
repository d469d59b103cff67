"""At the edge between two stages matrices become factors of low rank, and factors become matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of, on_mesh, tiny, tool
from flax.traverse_util import flatten_dict
from test_low_rank import groups_of, matrix, products
from test_spikes import poisoned
from trained import EDGE, NEW_MESH, STEPS, config_of, losses, stage, train_until

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.data.packed import fields_of
from hybrid_attn.infer import loading
from hybrid_attn.model import specs
from hybrid_attn.parallel.mesh import abstract_mesh
from hybrid_attn.plan.estimate import estimated_memory
from hybrid_attn.train import loop
from hybrid_attn.train.cost import flops_per_token
from hybrid_attn.train.precompile import NextStep
from hybrid_attn.train.resume import check_arrays, check_overrides
from hybrid_attn.train.step import TrainState, abstract_state, begin_stage

pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")
RANK = "model.low_rank.rank_fraction"
ONE_G = {"model.pattern": "G", "model.num_layers": 1}
EXTRAS = {"optim.ema_half_life": 0.1, "optim.spike_factor": 3.0}


def stages_of(*overrides: dict) -> list[dict]:
    return [stage(EDGE, 48, 8) | {"override": base.override(keys)} for keys in overrides]


def config_with(*overrides: dict, **changes) -> config.Config:
    return tiny(ONE_G | changes | {"stages": stages_of(*overrides)})


def drawn_state(c: config.Config) -> TrainState:
    """A state of the first stage of `c` with random numbers in its arrays of floats, on the mesh in force."""
    state, rng = abstract_state(c, jax.sharding.get_mesh()), np.random.default_rng(3)
    return jax.tree.map(lambda x: jax.device_put((7 * rng.random(x.shape)).astype(x.dtype), x.sharding), state)


def arrays(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def check_like(state: TrainState, expected: TrainState) -> None:
    """The state has the arrays and the shardings of an abstract one."""
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize(
    "optimiser, mesh", [("muon", {}), pytest.param("adamw", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)]
)
def test_matrices_become_the_nearest_products_and_the_state_of_other_parameters_goes_on(optimiser, mesh):
    c = config_with({}, {RANK: 0.5}, **EXTRAS | {"optim.optimiser": optimiser})
    mesh = mesh_of(**mesh)
    with jax.set_mesh(mesh):
        before = drawn_state(c)
        state = begin_stage(c, 1, before)
        check_like(state, abstract_state(c, mesh, 1))
    of_dense, of_factors = (flatten_dict(specs(c.at(i).model), sep="/") for i in (0, 1))
    dense, pairs = flatten_dict(before.params, sep="/"), groups_of(state.params)
    assert len(pairs) == 5
    for name, pair in pairs.items():
        w, u, v = (matrix(*x) for x in ((of_dense[name], dense[name]), *((of_factors[f"{name}/{x}"], pair[x]) for x in "uv")))
        p, s, q = np.linalg.svd(w, full_matrices=False)
        r = len(s) // 2
        assert u.shape[1] == r
        assert_close(u @ v, (p[:, :r] * s[:r]) @ q[:r], 1e-5)
    old, new = (arrays((x.params, x.opt_state)) for x in (before, state))
    added = new.keys() - old.keys()
    assert {name for name in added if new[name].any()} == {name for name in added if name.startswith("[0]")}
    for name in new.keys() & old.keys():
        np.testing.assert_array_equal(new[name], old[name], name)
    assert_close(state.extras["ema"], state.params, 0)
    assert_close(state.extras["spikes"], before.extras["spikes"], 0)


def test_factors_become_their_product_and_factors_of_another_rank_the_nearest_ones(one_device):
    targets = {"model.low_rank.targets": ("*/attention/q",)}
    c = config_with({RANK: 0.5, "model.low_rank.targets": ("*/attention/[qo]",)}, targets | {RANK: 0.5}, targets | {RANK: 0.25})
    state = drawn_state(c)
    first, second = products(c.at(0).model, state.params), begin_stage(c, 1, state)
    check_like(second, abstract_state(c, one_device, 1))
    assert_close(products(c.at(1).model, second.params), first, 1e-6)
    assert_close(second.params["periods"]["G0"]["attention"]["q"], state.params["periods"]["G0"]["attention"]["q"], 0)
    third = begin_stage(c, 2, second)
    check_like(third, abstract_state(c, one_device, 2))
    (name,) = groups_of(third.params)
    ws = [flatten_dict(products(c.at(i).model, x.params), sep="/") for i, x in ((1, second), (2, third))]
    errors = {key: np.linalg.norm(x - ws[1][key]) for key, x in ws[0].items()}
    values = np.linalg.svd(np.reshape(ws[0][name], (32, 32)), compute_uv=False)
    assert errors.pop(name) == pytest.approx(np.linalg.norm(values[8:]), rel=1e-4) and not any(errors.values())


def test_the_step_of_a_stage_with_factors_is_compiled_before_its_edge(one_device):
    c, compiled = config_with({}, {RANK: 0.5}), []
    step = jax.jit(lambda state, batch: compiled.append(1) or jax.tree.map(jnp.sum, (state.params, batch)))
    state = drawn_state(c)
    it = NextStep(c, (lambda *_: None, step), [one_device] * 2)
    it.begin(2, state)
    it.wait(step)
    assert len(compiled) == 1
    step(begin_stage(c, 1, state), on_mesh({name: np.full((8, 48), 2, dtype) for name, dtype in fields_of(c.at(1)).items()}))
    assert len(compiled) == 1


def test_flops_are_those_of_the_model_of_the_stage():
    c = config_with({}, {RANK: 0.25})
    dense, factors = (sum(x.multiplications for x in flatten_dict(specs(c.at(i).model)).values()) for i in (0, 1))
    assert flops_per_token(c.at(0)) - flops_per_token(c.at(1)) == 6 * (dense - factors) > 0


@pytest.mark.slow
def test_the_estimated_memory_is_that_of_the_model_of_the_stage():
    c, mesh = config_with({}, {RANK: 0.25}), abstract_mesh()
    assert estimated_memory(c, c.at(0), mesh, "cpu") > estimated_memory(c, c.at(1), mesh, "cpu")


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {RANK: 0.5, "model.d_ff": 64},
            r"^stages\[1\].override changes the arrays .* except factors .*\n  model.d_ff: 48 -> 64$",
        ),
        ({RANK: 0.5, "model.low_rank.init": "he"}, r"override.model.low_rank.init is not possible: all stages share model.low"),
        ({RANK: 1.5}, r"^stages\[1\].override.model: model.low_rank.rank_fraction=1.5 must be positive and at most 1"),
        (
            {RANK: 0.5, "model.low_rank.targets": ("*/attention/w",)},
            "^model.low_rank.targets names '.*/attention/w', and this model, among",
        ),
        ({RANK: 0.5, "train.mlp_chunk": 8}, "^train.mlp_chunk=8 and model.low_rank.rank_fraction=0.5: use only one"),
    ],
)
def test_an_override_that_factors_cannot_follow_is_refused(keys, message, one_device):
    with pytest.raises(ValueError, match=message):
        c = config_with({}, keys)
        check_overrides(c)
        specs(c.at(1).model)


def test_a_model_with_an_adapter_gets_no_factors():
    with pytest.raises(ValueError, match=r"^stages\[1\].override.model: model.adapter.type='lora' stands beside matrices"):
        config_with({}, {RANK: 0.5}, **{"model.adapter.type": "lora"})


def test_factors_that_were_made_anew_at_an_edge_are_not_averaged(monkeypatch):
    c = config_with({RANK: 0.5}, {}, {RANK: 0.5})
    saved = [loading.Saved(c.of_stage(len(steps) - 1), None, steps, None) for steps in ([EDGE], [EDGE, EDGE, 1])]
    with tool("merge") as merge:
        monkeypatch.setattr(merge.checkpoint, "read_config", lambda *_: config.to_dict(c))
        models = [merge.Model("one", sum(x.stage_steps), "params", x) for x in saved]
        merge.check_same_factors([models[0]._replace(step=step) for step in (1, 2)])
        with pytest.raises(ValueError, match="^one/3 has factors of low rank; merge checkpoints of one stage of one run, or"):
            merge.check_same_factors(models)


def test_a_rank_may_change_before_its_stage_begins_and_not_in_it(one_device):
    saved, c = config.to_dict(config_with({}, {RANK: 0.5})), config_with({}, {RANK: 0.25})
    check_arrays(saved, c, EDGE, "it")
    with pytest.raises(ValueError, match=r"^it is of another model .*\n  model.low_rank.rank_fraction: 0.5 -> 0.25\nuse"):
        check_arrays(saved, c, EDGE + 1, "it")


def config_of_run(corpus, keys=None, **changes) -> config.Config:
    """Three steps of a dense model, and three of the full rank, or of `keys`, on another mesh."""
    stages = stages_of({}, NEW_MESH | ({RANK: 1.0} if keys is None else keys))
    values = (
        ONE_G | EXTRAS | {"train.keep": STEPS, "train.checkpoint_every": 1, "evals.names": ("position",), "evals.every": EDGE}
    )
    return config_of(corpus, stages=stages, **values | changes)


def ended(workdir) -> tuple:
    """What identifies the last state of a run, its losses, and the loss by position of its evaluations."""
    groups = [checkpoint.fingerprint(workdir / "checkpoints", group=group) for group in ("params", "opt_state", "extras")]
    return groups, losses(workdir), (workdir / "evals.jsonl").read_text()


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """The workdir of an uninterrupted run of `config_of_run`, and its config."""
    workdir = tmp_path_factory.mktemp("straight")
    c = config_of_run(corpus)
    assert loop.train(c, workdir)
    return workdir, c


@pytest.mark.slow
def test_at_full_rank_the_first_loss_after_the_edge_is_that_of_a_dense_run(corpus, straight, tmp_path):
    assert loop.train(config_of_run(corpus, {}, **{"evals.names": ()}), tmp_path)
    factors, dense = losses(straight[0]), losses(tmp_path)
    assert [factors[step] for step in range(1, EDGE + 1)] == [dense[step] for step in range(1, EDGE + 1)]
    assert factors[EDGE + 1] == pytest.approx(dense[EDGE + 1], rel=1e-5)
    assert factors[EDGE + 2] != dense[EDGE + 2]


@pytest.mark.slow
@pytest.mark.parametrize("step", [EDGE, EDGE + 1, pytest.param(EDGE - 1, marks=pytest.mark.exhaustive)])
def test_a_run_that_stops_around_the_edge_ends_as_one_that_does_not(straight, tmp_path, step):
    workdir, c = straight
    train_until(step, c, tmp_path)
    assert loop.train(c, tmp_path)
    assert ended(tmp_path) == ended(workdir)


@pytest.mark.slow
def test_a_checkpoint_has_the_model_of_its_stage(straight):
    workdir, c = straight
    with jax.set_mesh(mesh_of()):
        loaded = {step: loading.load(workdir, step) for step in (EDGE, EDGE + 1)}
    assert [loaded[step].config.model for step in loaded] == [c.at(0).model, c.at(1).model]
    assert [len(groups_of(loaded[step].params)) for step in loaded] == [0, 5]
    assert [(workdir / "evals" / str(step) / "report.html").exists() for step in (EDGE, STEPS)] == [True, True]


@pytest.mark.slow
def test_a_rollback_to_a_step_before_the_edge_is_a_run_that_skips_the_steps(corpus, tmp_path, monkeypatch):
    poisoned(monkeypatch, {EDGE + 1, EDGE + 2})
    c = config_of_run(corpus, **{"optim.max_consecutive_spikes": 1, "optim.rollback_steps": 2})
    assert loop.train(c, tmp_path / "back")
    assert checkpoint.read_data(tmp_path / "back/checkpoints")["rollbacks"] == [[EDGE - 1, EDGE + 2]]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Stop, "reached", lambda self, step: step == EDGE - 1)
        assert not loop.train(c, tmp_path / "flag")
    assert loop.train(c, tmp_path / "flag", skip_steps=[(EDGE, EDGE + 2)])
    assert ended(tmp_path / "back")[:2] == ended(tmp_path / "flag")[:2]
