"""Mixtures that are made of dense models: every parameter is the one of its recipe, and wrong input writes nothing."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, REFERENCE, assert_close, loss_and_grads, mesh_of, models_config, on_mesh, random_params, tiny, tool
from flax import nnx
from flax.traverse_util import flatten_dict
from test_docs import ROOT, commands
from test_loading import save

from configs.upcycle import mixture as shipped
from hybrid_attn import checkpoint, config, trees, upcycle
from hybrid_attn.infer import loading
from hybrid_attn.model import losses, specs
from hybrid_attn.model.domain_router import DomainRouter
from hybrid_attn.train.step import init_state, make_step

D, SEEDS = 32, (3, 5, 7)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A directory with checkpoints of steps 3, 5 and 7, whose parameters have those seeds."""
    folder = tmp_path_factory.mktemp("dense")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}.\n" for j in range(20)))
    save(folder / "run", models_config(folder), steps=SEEDS, chat_template="mine")
    return folder / "run"


@pytest.fixture(scope="module")
def params():
    """By seed, and the mean of all."""
    with jax.set_mesh(mesh_of()):
        models = [jax.device_get(flatten_dict(random_params(tiny().model, seed), sep="/")) for seed in SEEDS]
    mean = {name: np.mean([x[name].astype(np.float64) for x in models], 0).astype(np.float32) for name in models[0]}
    return models, mean


def upcycled(out, *arguments):
    """The checkpoint that the tool makes."""
    with tool("upcycle") as program:
        program.flags.FLAGS(["upcycle", *arguments, f"--out={out}"])
        program.upcycle_models()
    loaded = loading.load(out)
    return loaded.config.model, jax.device_get(flatten_dict(loaded.params, sep="/"))


def of(dense, *seeds):
    return "--dense=" + ",".join(f"{dense}/{seed}" for seed in seeds)


def assert_layers(names, mixture, expected):
    for name in names:
        np.testing.assert_array_equal(mixture[name], expected(name), err_msg=name)


FFN = [f"periods/{layer}/mlp/{leaf}" for layer in ("L0", "G1") for leaf in ("gate", "up", "down")]
ROUTERS = ["periods/L0/mlp/router", "periods/G1/mlp/router"]


def test_sparse_upcycling_starts_at_the_loss_of_the_dense_model(dense, tmp_path, one_device):
    model, mixture = upcycled(tmp_path / "out", "--method=sparse", of(dense, 5), "--experts=4")
    assert model.kinds["G"].mlp.experts == 4 and model.kinds["G"].mlp.top_k == 2 and model.kinds["G"].mlp.renormalise
    loaded, batch = loading.load(tmp_path / "out").params, on_mesh(BATCH)
    score = jax.jit(losses, static_argnums=(0, 3))
    got = np.asarray(score(model, loaded, batch, REFERENCE)[0])
    expected = np.asarray(score(tiny().model, random_params(tiny().model, 5), batch, REFERENCE)[0])
    real_BT = BATCH["segments"] > 0  # padding is in no expert
    np.testing.assert_allclose(got[real_BT], expected[real_BT], rtol=1e-6, atol=1e-6 * float(expected.max()))
    assert all(np.std(mixture[name]) == pytest.approx(model.init_std, rel=0.3) for name in ROUTERS)
    data = checkpoint.read_data(tmp_path / "out")
    assert loading.chat_template(tmp_path / "out", 0) == "mine"
    assert data["upcycle"]["method"] == "sparse" and data["upcycle"]["seed"] == 0
    assert data["upcycle"]["models"][0]["step"] == 5 and "opt_state" not in str(checkpoint.read_shapes(tmp_path / "out"))
    _, other = upcycled(tmp_path / "other", "--method=sparse", of(dense, 5), "--experts=4", "--seed=1")
    assert all(np.all(mixture[name] != other[name]) for name in ROUTERS)


def test_btx_makes_an_expert_of_each_feed_forward_and_averages_all_else(dense, params, tmp_path, one_device):
    models, mean = params
    model, mixture = upcycled(tmp_path / "out", "--method=btx", of(dense, *SEEDS))
    assert_layers(FFN, mixture, lambda name: np.stack([x[name] for x in models], 1))
    assert_layers(mixture.keys() - {*FFN, *ROUTERS}, mixture, mean.get)
    assert (model.kinds["L"].mlp.experts, model.kinds["L"].mlp.top_k, model.kinds["L"].mixer) == (3, 2, "attention")


def test_bam_makes_experts_of_attentions_too_and_shares_mean_keys_in_global_layers(dense, params, tmp_path, one_device):
    models, mean = params
    model, mixture = upcycled(tmp_path / "out", "--method=bam", of(dense, *SEEDS))
    assert_layers(FFN, mixture, lambda name: np.stack([x[name] for x in models], 1))
    for i, dense_params in enumerate(models):
        for leaf in ("L0/{}/k", "L0/{}/q", "G1/{}/q", "G1/{}/o"):
            name = f"periods/{leaf.format(f'attention_experts/expert{i}')}"
            np.testing.assert_array_equal(mixture[name], dense_params[f"periods/{leaf.format('attention')}"])
    for leaf in ("k", "v"):
        np.testing.assert_array_equal(
            mixture[f"periods/G1/attention_experts/shared/{leaf}"], mean[f"periods/G1/attention/{leaf}"]
        )
    assert_layers(("embed", "final_norm/weight", "periods/L0/norm/weight"), mixture, mean.get)
    mlp = model.kinds["G"].mlp
    assert (mlp.top_k, mlp.renormalise, model.kinds["G"].attention_experts) == (1, False, 3)


def test_nexus_shares_the_feed_forward_of_the_seed_and_averages_the_experts(dense, params, tmp_path, one_device):
    models, _ = params
    model, mixture = upcycled(tmp_path / "out", "--method=nexus", of(dense, *SEEDS), "--domain_tokens=500")
    assert_layers(FFN, mixture, lambda name: np.stack([x[name] for x in models[1:]], 1))
    for name in FFN:
        np.testing.assert_array_equal(mixture[name.replace("/mlp/", "/mlp/shared/")], models[0][name])
    name = "periods/L0/attention/q"
    np.testing.assert_array_equal(
        mixture[name], ((models[1][name].astype(np.float64) + models[2][name]) / 2).astype(np.float32)
    )
    domains_PEm = mixture["periods/L0/mlp/router/domains"]
    assert domains_PEm.shape == (1, 2, D) and np.sqrt(np.square(domains_PEm).mean(-1)) == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(domains_PEm, mixture["periods/G1/mlp/router/domains"])
    mlp = model.kinds["G"].mlp
    assert (mlp.experts, mlp.shared_experts, mlp.top_k, mlp.renormalise, mlp.domain_dim) == (2, 1, 1, False, D)


def test_the_experts_of_a_mixture_have_the_fields_of_the_dense_feed_forward():
    values = config.to_dict(tiny(L={"mlp.swiglu_limit": 7.0, "mlp.swiglu_alpha": 1.5, "mlp.d_ff": 24}))
    mlp = upcycle.mixture(values, upcycle.btx(2, 1), {"top_k": 1})["model"]["kinds"]["L"]["mlp"]
    assert (mlp["swiglu_limit"], mlp["swiglu_alpha"], mlp["d_ff"], mlp["experts"], mlp["top_k"]) == (7.0, 1.5, 24, 2, 1)


def test_the_embedding_of_a_domain_is_the_mean_of_its_tokens_at_a_size_of_one():
    embed_VD = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    tokens = [2, 2, 6, 0]
    got = upcycle.domain_embedding(np.bincount(tokens, minlength=7), embed_VD)
    mean = embed_VD[tokens].mean(0)
    np.testing.assert_allclose(got, mean / np.sqrt(np.square(mean).mean()), rtol=1e-5)


def test_half_of_the_tokens_of_an_extended_mixture_are_of_the_added_domain():
    c = config.build(trees.plain(shipped.get_config("tiny,linear_extended")))
    shares = {name: weight / sum(c.at(0).mixture.values()) for name, weight in c.at(0).mixture.items()}
    assert shares == pytest.approx({"modules": 1 / 6, "tables": 1 / 6, "documentation": 1 / 6, "language": 1 / 2})
    mlp = c.model.kinds["L"].mlp
    assert (mlp.experts, mlp.shared_experts, mlp.domain_dim) == (shipped.MODELS, 1, None)


@pytest.fixture(scope="module")
def nexus_of_two(dense, tmp_path_factory):
    """A mixture of nexus with two experts, whose domain embeddings come from a file."""
    folder = tmp_path_factory.mktemp("nexus")
    np.save(folder / "domains.npy", np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32))
    np.save(folder / "new.npy", np.random.default_rng(1).normal(size=(1, 6)).astype(np.float32))
    with jax.set_mesh(mesh_of()):
        upcycled(folder / "out", "--method=nexus", of(dense, *SEEDS), f"--domains={folder / 'domains.npy'}")
    return folder


def test_an_added_expert_leaves_the_ratios_of_the_other_gates_as_they_are(nexus_of_two, dense, params, tmp_path, one_device):
    folder, before = nexus_of_two, loading.load(nexus_of_two / "out")
    arguments = "--method=nexus", f"--dense={folder / 'out'}", f"--domains={folder / 'new.npy'}"
    model, mixture = upcycled(tmp_path / "out", *arguments, f"--add_expert={dense}/3")
    x_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, D)), jnp.float32)

    def gates(model, params):
        leaves = jax.tree.map(lambda x: jnp.asarray(x[0]), params["periods"]["L0"]["mlp"]["router"])
        router = DomainRouter(model, model.kinds["L"].mlp.experts, 6, rngs=nnx.Rngs(0))
        nnx.update(router, leaves)
        return np.asarray(jax.nn.softmax(router(x_BTD), -1))

    old, new = gates(before.config.model, before.params), gates(model, loading.load(tmp_path / "out").params)
    assert new.shape[-1] == 3 and new[..., 2].min() > 0
    np.testing.assert_allclose(new[..., :2] / new[..., :2].sum(-1, keepdims=True), old, rtol=1e-6, atol=1e-6)
    was, (first, *_) = jax.device_get(flatten_dict(before.params, sep="/")), params[0]
    for name in FFN:
        np.testing.assert_array_equal(mixture[name], np.concatenate([was[name], first[name][:, None]], 1))
        shared = name.replace("/mlp/", "/mlp/shared/")
        np.testing.assert_array_equal(mixture[shared], was[shared])
    np.testing.assert_allclose(mixture["embed"], 2 / 3 * was["embed"] + 1 / 3 * first["embed"], rtol=1e-5, atol=1e-7)


def test_the_bias_of_an_added_expert_is_the_mean_of_the_others(dense, tmp_path, one_device):
    values = config.to_dict(models_config(dense.parent))
    values = upcycle.mixture(values, upcycle.nexus(3, 8), {"domain_dim": 6, "bias_rate": 0.001})
    save(tmp_path / "biased", config.build(values), steps=[1])
    np.save(tmp_path / "new.npy", np.ones((1, 6), np.float32))
    arguments = "--method=nexus", f"--dense={tmp_path / 'biased'}", f"--domains={tmp_path / 'new.npy'}"
    _, mixture = upcycled(tmp_path / "out", *arguments, f"--add_expert={dense}/3")
    was = jax.device_get(flatten_dict(loading.load(tmp_path / "biased").params, sep="/"))
    for name in ("periods/L0/mlp/bias", "periods/G1/mlp/bias"):
        assert mixture[name].dtype == np.float32 and was[name].any()
        np.testing.assert_array_equal(mixture[name][:, :2], was[name])
        np.testing.assert_allclose(mixture[name][:, 2], was[name].mean(1), rtol=1e-6)


def test_the_seed_gives_the_embedding_of_an_added_domain(dense, tmp_path, one_device):
    upcycled(tmp_path / "two", "--method=nexus", of(dense, *SEEDS), "--domain_tokens=500")
    arguments = "--method=nexus", f"--dense={tmp_path / 'two'},{dense}/3", "--domain_tokens=500"
    model, mixture = upcycled(tmp_path / "three", *arguments, f"--add_expert={dense}/5")
    domains_Em = mixture["periods/L0/mlp/router/domains"][0]
    assert model.kinds["L"].mlp.experts == 3 and domains_Em.shape == (3, D)
    np.testing.assert_array_equal(domains_Em[2], domains_Em[0])  # all were trained on the same documents


@pytest.fixture(scope="module")
def linear(dense, tmp_path_factory):
    """Mixtures of two experts whose routers are matrices, by method."""
    folder = tmp_path_factory.mktemp("linear")
    with jax.set_mesh(mesh_of()):
        upcycled(folder / "nexus", "--method=nexus", of(dense, *SEEDS), "--router=linear")
        upcycled(folder / "btx", "--method=btx", of(dense, *SEEDS[:2]))
    return {name: folder / name for name in ("nexus", "btx")}


def test_a_linear_router_is_all_that_differs_from_a_mixture_of_nexus(nexus_of_two, linear, one_device):
    projected, other = (loading.load(path) for path in (nexus_of_two / "out", linear["nexus"]))
    differences = trees.differences(config.to_dict(projected.config), config.to_dict(other.config))
    assert [line.split(":")[0] for line in differences] == [f"model.kinds.{letter}.mlp.domain_dim" for letter in "GL"]
    was, params = (jax.device_get(flatten_dict(x.params, sep="/")) for x in (projected, other))
    assert params[ROUTERS[0]].shape == (1, D, 2)
    assert params.keys() - set(ROUTERS) == {name for name in was if "/router/" not in name}
    assert_layers(params.keys() - set(ROUTERS), params, was.get)


@pytest.mark.parametrize("method", ["nexus", pytest.param("btx", marks=pytest.mark.slow)])
def test_an_expert_added_to_a_linear_router_is_a_new_column(method, dense, params, linear, tmp_path, one_device):
    was = jax.device_get(flatten_dict(loading.load(linear[method]).params, sep="/"))
    arguments = f"--method={method}", f"--dense={linear[method]}", f"--add_expert={dense}/7", "--seed=4"
    model, mixture = upcycled(tmp_path / "out", *arguments)
    assert model.kinds["L"].mlp.experts == 3
    for name in ROUTERS:
        np.testing.assert_array_equal(mixture[name][..., :2], was[name])
        assert mixture[name].shape == (1, D, 3) and np.std(mixture[name][..., 2]) == pytest.approx(model.init_std, rel=0.4)
    assert np.all(mixture[ROUTERS[0]][..., 2] != mixture[ROUTERS[1]][..., 2])
    assert_layers(FFN, mixture, lambda name: np.concatenate([was[name], params[0][2][name][:, None]], 1))
    _, other = upcycled(tmp_path / "other", *arguments[:-1])
    assert all(np.all(mixture[name][..., 2] != other[name][..., 2]) for name in ROUTERS)


def test_a_mixture_with_an_added_expert_has_the_sources_of_both():
    values = {"data": {"sources": {"a": 1, "b": 2}, "seed": 3}, "stages": [{"mixture": {"a": 1.0}}, {"mixture": {"b": 0.5}}]}
    added = {"data": {"sources": {"b": 7, "a": 1, "c": 4}}, "stages": [{"mixture": {"a": 1.0, "b": 2.0, "c": 3.0}}]}
    got = upcycle.with_sources(values, added, 5)
    assert got["data"] == {"sources": {"a": 1, "b": 2, "b_5": 7, "c": 4}, "seed": 3}
    assert got["stages"] == [{"mixture": {"a": 1.0}}, {"mixture": {"b": 0.5, "a": 1.0, "b_5": 2.0, "c": 3.0}}]
    assert list(values["stages"][-1]["mixture"]) == ["b"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method=sparse", "--dense={0}/3,{0}/5"], "sparse makes experts of one model, not of 2; use btx"),
        (["--method=btx", "--dense={0}/3"], "btx makes an expert of each model, and --dense names 1; name 2 or more"),
        (["--method=nexus", "--dense={0}/3,{0}/5"], "nexus needs the seed and 2 experts, and --dense names 2 models"),
        (["--method=btx", "--dense={0}/3,{0}/4"], "run/4 is no directory; name a run's workdir"),
        (["--method=sparse", "--dense={0}/3", "--experts=1", "--top_k=2"], "mlp.top_k=2 is above mlp.experts=1"),
        (["--method=btx", "--dense={0}/3,{0}/5", "--domains=x.npy"], "--domains does not belong to --method=btx"),
        (
            ["--method=nexus", "--dense={0}/3,{0}/5,{0}/7", "--domains={1}/3.npy"],
            "3.npy has domain embeddings of 3x4, and 2 x any",
        ),
        (
            ["--method=nexus", "--dense={0}/3,{0}/5,{0}/7", "--domains={1}/none.npy"],
            "none.npy is no .npy file that can be read",
        ),
        (
            ["--method=nexus", "--dense={2}", "--add_expert={0}/3", "--domains={1}/3.npy"],
            "has domain embeddings of 3x4, and 1 x 6",
        ),
        (["--method=nexus", "--dense={2}", "--add_expert={0}/3"], "--add_expert needs --dense=MIXTURE,SEED"),
        (["--method=nexus", "--dense={0}/3,{0}/3", "--add_expert={0}/3"], "/3 is no mixture of nexus: layer type G has mixer="),
        (["--method=btx", "--dense={2}", "--add_expert={0}/3"], "is no mixture of btx: .* mlp.shared_experts=1"),
        (["--method=nexus", "--dense={3},{0}/3", "--add_expert={0}/3"], "--dense=MIXTURE for .*, not 2 models"),
        (["--method=nexus", "--dense={3}", "--add_expert={0}/3", "--domains={1}/3.npy"], "--domains is of a projected router"),
        (["--method=nexus", "--dense={3}", "--add_expert={0}/3", "--router=linear"], "--router is of a new mixture"),
        (
            ["--method=nexus", "--dense={3}", "--add_expert={1}/wide"],
            r"mlp/gate has \(1, 32, 40\) in .*wide/1, and \(1, 32, 48\)",
        ),
        (["--method=btx", "--dense={0}/3,{0}/5", "--router=linear"], "--router does not belong to --method=btx"),
        (
            ["--method=nexus", "--dense={0}/3,{0}/5,{0}/7", "--router=linear", "--domain_tokens=9"],
            "--domain_tokens is of a projected router, and does not belong to --router=linear",
        ),
        (["--method=sparse", "--dense={2}"], "layer type G has mixer='attention' and mlp.type='moe'; a dense model has"),
        (
            ["--method=btx", "--dense={0}/3,{1}/wide"],
            r"periods/G1/mlp/gate has \(1, 32, 40\) in .*wide/1, and \(1, 32, 48\) is",
        ),
        (["--method=btx", "--dense={0}/3,{1}/bpe"], "were trained with different tokenizers"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, message, dense, nexus_of_two, linear, tmp_path, one_device):
    np.save(tmp_path / "3.npy", np.zeros((3, 4)))
    if any("wide" in x for x in arguments):
        save(tmp_path / "wide", tiny({"model.d_ff": 40}), steps=(1,))
    if "bpe" in arguments[1]:
        save(tmp_path / "bpe", tiny(), "another", steps=(1,))
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError) as error:
        upcycled(tmp_path / "out", *(x.format(dense, tmp_path, nexus_of_two / "out", linear["nexus"]) for x in arguments))
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_existing_directory_is_not_written_to(dense, tmp_path, one_device):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is not an empty directory; name another --out"):
        upcycled(tmp_path / "out", "--method=sparse", of(dense, 3))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def with_domains() -> config.Config:
    mlp = {"mlp.type": "moe", "mlp.experts": 4, "mlp.top_k": 1, "mlp.domain_dim": 6, "mlp.shared_experts": 1}
    mlp |= {"mlp.renormalise": False}
    return tiny({"model.block": "pre"}, L={"window": 5, "rope_theta": 100.0} | mlp, G=mlp)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"expert": 4, "fsdp": 2}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_a_projected_router_is_the_same_on_every_mesh(sizes):
    c, results = with_domains(), []
    for of_mesh in ({}, sizes):
        with jax.set_mesh(mesh_of(**of_mesh)):
            results.append(jax.device_get(loss_and_grads(c.model, REFERENCE, random_params(c.model), on_mesh(BATCH))))
    assert_close(results[1], results[0], 1e-5)
    router = flatten_dict(results[0][1]["periods"]["L0"]["mlp"]["router"], sep="/")
    assert not router["domains"].any() and all(router[name].any() for name in ("gate", "up", "out"))


def test_a_projected_router_costs_the_products_of_a_token_with_its_experts():
    leaves = specs(with_domains().model)["periods"]["L0"]["mlp"]["router"]
    assert sum(leaves[name].multiplications for name in leaves) == 4 * D
    linear = tiny(L={"mlp.type": "moe", "mlp.experts": 4}).model
    assert specs(linear)["periods"]["L0"]["mlp"]["router"].multiplications == 4 * D


@pytest.mark.slow
def test_training_does_not_move_domain_embeddings(one_device):
    c = with_domains()
    state = jax.jit(init_state, static_argnums=0)(c)
    before = jax.device_get(state.params["periods"]["L0"]["mlp"]["router"])
    for _ in range(2):
        state, _ = make_step(c.at(0), REFERENCE)(state, on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"])}))
    after = jax.device_get(state.params["periods"]["L0"]["mlp"]["router"])
    np.testing.assert_array_equal(after["domains"], before["domains"])
    assert np.std(before["domains"]) == pytest.approx(1, rel=0.3) and not np.array_equal(after["gate"], before["gate"])


@pytest.mark.exhaustive  # each command starts jax
@pytest.mark.slow
def test_the_commands_of_the_page_follow_one_another_from_a_seed_to_a_mixture_with_an_added_expert(tmp_path):
    page = [words for words in commands((ROOT / "docs" / "upcycling.md").read_text()) if words[1] != "tools/plan.py"]
    shorter = {"launch/train.py": ["--steps=2", "--config.evals.tokens=1024"]}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for _, script, *words in page:
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
        subprocess.run([sys.executable, ROOT / script, *words, *shorter.get(script, [])], cwd=tmp_path, env=env, check=True)
    for name in ("bam", "sparse", "extended"):
        record = checkpoint.read_data(tmp_path / "runs" / name / "checkpoints")["init_from"]
        assert not record["new"] and not record["ignored"] and not record["notes"], name
    values = checkpoint.read_config(tmp_path / "runs" / "extended" / "checkpoints")
    assert values["model"]["kinds"]["L"]["mlp"]["experts"] == 4
