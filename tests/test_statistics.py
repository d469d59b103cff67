"""Statistics of a step are those of dense float64 arithmetic, on any mesh, and leave every other number as it is."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, biggest_array, every, layout, mesh_of, on_mesh, random_params, tiny
from jax.sharding import PartitionSpec as P
from trained import config_of, losses

from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.model import attention_sums, losses_and_aux, statistics
from hybrid_attn.model.statistics import LayerStatistics
from hybrid_attn.parallel.mesh import HEADS_BTNH, TOKENS_BT
from hybrid_attn.train import loop
from hybrid_attn.train.statistics import BY_LAYER_TYPE, numbers, of_experts, of_layers
from hybrid_attn.train.step import init_state, make_step

B, T, N, K, H = 2, 48, 4, 2, 8
ROWS = ("a" * 17 + "b" * 24 + "." * 7, "a" * 5 + "b" * 43)
MESHES = [{}, {"data": 2, "context": 2, "tensor": 2}]
CASES = {"full": (None, None, False), "window, cap and sink": (7, 3.0, True)}


def dense(q_NH, k_SKH, seen_S, options, sinks_N):
    """(the largest score, the entropy in bits, the share of the first key) of each head of one query, in float64."""
    k_NSH = np.repeat(k_SKH[seen_S].astype(np.float64).swapaxes(0, 1), N // K, axis=0)
    s_NS = options.scale * np.einsum("NH,NSH->NS", q_NH.astype(np.float64), k_NSH)
    s_NS = s_NS if options.softcap is None else options.softcap * np.tanh(s_NS / options.softcap)
    with_sink_NS = s_NS if sinks_N is None else np.concatenate([s_NS, sinks_N[:, None]], 1)
    p_NS = np.exp(with_sink_NS) / np.exp(with_sink_NS).sum(1, keepdims=True)
    return s_NS.max(1), -(p_NS * np.log2(p_NS)).sum(1), p_NS[:, 0]


@pytest.mark.parametrize("sizes", MESHES, ids=["one", "eight"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_measured_as_a_dense_softmax_of_the_sampled_queries_would_be(case, sizes, monkeypatch):
    monkeypatch.setattr(attention_sums, "KEYS", 10)
    monkeypatch.setattr(statistics, "QUERIES", 8)
    window, softcap, has_sink = CASES[case]
    options, rng = AttentionOptions(window, 0.4, softcap), np.random.default_rng(0)
    q, k = (2 * rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K))
    sinks = rng.normal(size=N).astype(np.float32) if has_sink else None
    pos, seg = (np.stack(x) for x in zip(*map(layout, ROWS), strict=True))
    with jax.set_mesh(mesh_of(**sizes)):
        arrays = [jax.device_put(x, spec) for x, spec in ((q, HEADS_BTNH), (k, HEADS_BTNH), (pos, TOKENS_BT), (seg, TOKENS_BT))]
        on_devices = None if sinks is None else jax.device_put(sinks, P("tensor"))
        got = jax.device_get(jax.jit(functools.partial(statistics.of_attention, options))(*arrays, on_devices))
    for b in range(B):
        queries = [t for t in range(3, T, 6) if seg[b, t] > 0]  # evenly spaced, without padding
        values = []
        for t in queries:
            seen = (seg[b] == seg[b, t]) & (pos[b] <= pos[b, t]) & (pos[b, t] - pos[b] < (window or T))
            largest, entropy, share = dense(q[b, t], k[b], seen, options, sinks)
            values.append((largest, entropy, share * (pos[b, seen][0] == 0)))
        largest_QN, entropy_QN, share_QN = map(np.array, zip(*values, strict=True))
        assert got.queries_B[b] == len(queries) and len(queries) == (7, 8)[b]
        np.testing.assert_allclose(got.max_logit_BN[b], largest_QN.max(0), rtol=1e-5)
        np.testing.assert_allclose(got.entropy_bits_BN[b], entropy_QN.sum(0), rtol=1e-4)
        np.testing.assert_allclose(got.first_token_share_BN[b], share_QN.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 3, 32, 64, 100])
def test_sampled_queries_are_spread_evenly_over_a_sequence_in_zigzag_order(shards):
    T = 40 * shards
    early, late = np.split(np.arange(T).reshape(2 * shards, 20), 2)
    tokens_of_shards = np.concatenate([early, late[::-1]], 1)
    tokens = np.sort(tokens_of_shards[:, statistics.sampled(40, shards)].ravel())
    assert len(tokens) == shards * min(max(64 // shards, 2), 40)
    assert np.diff(tokens, prepend=0, append=T).max() <= 2 * T / len(tokens)


def test_the_largest_array_is_a_block_of_scores_of_the_sample(one_device):
    long = 64 * 1024
    q = k = jnp.zeros((1, long, 1, H), out_sharding=HEADS_BTNH)
    pos = seg = jnp.ones((1, long), jnp.int32, out_sharding=TOKENS_BT)
    measure = functools.partial(statistics.of_attention, AttentionOptions(None, 1.0), sinks_N=None)
    assert biggest_array(measure, q, k, pos, seg, inside="scan") == statistics.QUERIES * attention_sums.KEYS


def test_activations_have_a_root_mean_square_and_count_what_is_beyond_six_of_it(one_device):
    x = np.random.default_rng(0).normal(size=(B, T, 64)).astype(np.float32)
    x[0, 3, :2], x[1, 7, 5], x[0, 45, :3] = 40.0, -40.0, 90.0  # the last one in padding; two of 40 are 5.6 root mean squares
    seg = np.stack([layout(row)[1] for row in ROWS])
    got = statistics.of_activations(jnp.asarray(x), jnp.asarray(seg))
    mean = np.where(seg > 0, np.square(x, dtype=np.float64).mean(-1), 0)
    np.testing.assert_allclose(got.mean_square_B, mean.sum(1), rtol=1e-5)
    assert got.outliers_B.tolist() == [0, 1] and got.tokens_B.tolist() == [41, 48]


MODEL = tiny({}, L={"window": 5, "rope_theta": 100.0}, G={"qk_norm": "rms", "sink": True})
FULL = BATCH | {"bytes": np.ones_like(BATCH["weights"])}


@functools.cache
def forward(mesh: int):
    """The statistics of a forward pass on one of `MESHES`, all of the same parameters."""
    execution = BLOCKED._replace(statistics=True, zigzag=True)
    with jax.set_mesh(mesh_of(**MESHES[mesh])):
        run = jax.jit(lambda *x: of_layers(losses_and_aux(MODEL.model, *x, execution)[2]["statistics"]))
        return jax.device_get(run(random_params(MODEL.model), on_mesh(FULL)))


@pytest.mark.slow
def test_a_mesh_that_splits_sequences_heads_and_the_batch_measures_what_one_device_does():
    one, eight = forward(0), forward(1)
    assert {name for name in one} == {f"{name}/{letter}" for name in BY_LAYER_TYPE[:5] for letter in "LG"}
    assert one["entropy_bits/G"] > one["entropy_bits/L"] > 0.5 and 0 < one["first_token_share/L"] < 1
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def steps():
    """Metrics and state of two steps with and without statistics, in two microbatches."""
    stage = dataclasses.replace(MODEL.stages[0], microbatches=2)
    c = dataclasses.replace(MODEL, stages=(stage,))

    def run(measured):
        step = make_step(c.at(0), BLOCKED._replace(remat=every("layer"), statistics=measured))
        state, all_metrics = init_state(c, random_params(c.model)), []
        for _ in range(2):
            state, metrics = step(state, on_mesh(FULL))
            all_metrics.append(jax.device_get(metrics))
        return all_metrics, jax.device_get(state)

    with jax.set_mesh(mesh_of()):
        return run(True), run(False)


def test_a_step_with_statistics_changes_the_state_as_one_without_does_bit_for_bit(steps):
    (measured, state), (plain, expected) = steps
    for with_statistics, without in zip(measured, plain, strict=True):
        assert {k: x for k, x in with_statistics.items() if k != "statistics"} == without
    assert all(np.array_equal(*x) for x in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True))


def test_norms_are_those_of_the_leaves_of_a_layer_type_and_of_the_step_that_was_taken(steps):
    (measured, state), _ = steps
    first, values, last = measured[0], measured[0]["statistics"], measured[1]["statistics"]
    of_q = np.linalg.norm(state.params["periods"]["G1"]["attention"]["q"])
    assert (
        last["param_norm/G/attention/q"] == pytest.approx(of_q, rel=1e-5) and "param_norm/L/attention/q_norm/weight" not in last
    )
    for name in ("param_norm", "grad_norm"):
        parts = [x for key, x in values.items() if key.startswith(f"{name}/") and key.count("/") == 1]
        assert len(parts) == 4 and np.sqrt(np.square(parts).sum()) == pytest.approx(first[name], rel=1e-5)
        leaves = [x for key, x in values.items() if key.startswith(f"{name}/L/")]
        assert len(leaves) == 8 and np.sqrt(np.square(leaves).sum()) == pytest.approx(values[f"{name}/L"], rel=1e-5)
    assert 0 < last["update_norm/embed"] < last["param_norm/embed"]


def test_microbatches_have_the_largest_logit_and_the_means_of_the_whole_batch(steps):
    (measured, _), _ = steps
    for name, value in forward(0).items():
        np.testing.assert_allclose(measured[0]["statistics"][name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("microbatches", [(), (2,)], ids=["one", "two"])
def test_experts_are_measured_by_layer_whatever_the_period_and_the_microbatches(microbatches):
    model = tiny({"model.prefix": "G", "model.pattern": "LG", "model.num_layers": 6}).model
    rng = np.random.default_rng(0)

    def layer(*periods):
        aux = {"expert_shares": (3,), "expert_load": (), "gate_shares": (2,), "aux_loss": ()}
        return LayerStatistics(None, None, {name: rng.normal(size=(*microbatches, *periods, *x)) for name, x in aux.items()})

    measured = {"periods": {"G1": layer(2), "L0": layer(2)}, "prefix": {"G0": layer()}, "tail": {"L0": layer()}}
    got = numbers(of_experts(model, measured))
    assert len(got) == 6 * (3 + 1 + 2)
    for i, (group, name, period) in enumerate([("prefix", "G0", ()), ("periods", "L0", 0), ("periods", "G1", 0)] + [
        ("periods", "L0", 1), ("periods", "G1", 1), ("tail", "L0", ())
    ]):  # fmt: skip
        aux = {key: x.mean(0) if microbatches else x for key, x in measured[group][name].aux.items()}
        assert got[f"expert_load/{name[0]}/layer{i}"] == aux["expert_load"][period]
        for e in range(3):
            assert got[f"expert_shares/{name[0]}/layer{i}/expert{e}"] == aux["expert_shares"][period][e]


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
def test_a_run_with_statistics_has_the_losses_of_one_without_and_each_record_once_when_it_resumes(corpus, tmp_path):
    sizes = {"mesh.context": 2, "mesh.tensor": 2, "model.pattern": "LG", "model.num_layers": 2, "train.remat": "layer"}
    c = config_of(corpus, **sizes)
    assert loop.train(c, tmp_path / "plain")
    measured = config_of(corpus, **sizes | {"train.statistics_every": 2})
    assert loop.train(measured, tmp_path / "measured")
    (tmp_path / "measured" / "checkpoints" / "6").rename(tmp_path / "6")
    assert loop.train(measured, tmp_path / "measured")
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    records = [json.loads(line) for line in (tmp_path / "measured" / "statistics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(f"{name}/{letter}" in record for record in records for name in BY_LAYER_TYPE for letter in "LG")
    assert not (tmp_path / "plain" / "statistics.jsonl").exists()
