"""Experts that the axis `expert` splits: every mesh computes what one device does, in training, decoding and the optimiser."""

import jax
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, REFERENCE, assert_close, biggest_array, mesh_of, on_mesh, random_params, tiny
from flax import nnx
from test_moe import ZIGZAG, inputs, layer_of, results_on

from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import abstract_params
from hybrid_attn.model.transformer import unstacked
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import abstract_mesh
from hybrid_attn.plan.collectives import collectives
from hybrid_attn.train.step import abstract_state, init_state, make_step

LOCAL = {"type": "moe", "d_ff": 24, "experts": 16, "top_k": 3, "router": "sigmoid", "shared_experts": 1, "bias_rate": 0.01}
MESHES = [
    pytest.param({"fsdp": 2, "expert": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"expert": 8}, marks=pytest.mark.exhaustive),
    pytest.param({"data": 2, "expert": 4}, marks=pytest.mark.exhaustive),
    pytest.param({"expert": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"slices": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.exhaustive),
]
STAGE = {"steps": 9, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
D = 32


def with_experts(changes=None):
    """A local layer whose experts are mostly on other devices, and a global one with one expert for each of eight."""
    local = {f"mlp.{name}": x for name, x in LOCAL.items()}
    of_global = {"mlp.type": "moe", "mlp.experts": 8, "qk_norm": "rms"}
    values = {"model.pattern": "LG", "model.num_layers": 2, "stages": [STAGE], "optim.warmup_steps": 0}
    return tiny(values | (changes or {}), L={"window": 5, "rope_theta": 100.0} | local, G=of_global)


@pytest.fixture(scope="module")
def on_one_device():
    return results_on({}, with_experts().model, REFERENCE)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_computes_the_loss_the_metrics_and_the_gradients_of_one_device(sizes, on_one_device):
    assert_close(results_on(sizes, with_experts().model, ZIGZAG), on_one_device, 1e-5)


@pytest.mark.slow
def test_a_state_that_one_mesh_saved_is_restored_on_a_mesh_of_experts_and_trains_on(tmp_path):
    c, batch = with_experts({"optim.optimiser": "muon"}), BATCH | {"bytes": np.ones_like(BATCH["weights"])}
    step = make_step(c.at(0), BLOCKED)
    with jax.set_mesh(mesh_of(fsdp=2)):
        first, _ = step(init_state(c, random_params(c.model)), on_mesh(batch))
        checkpoints = Checkpoints(tmp_path, keep=1, every=1)
        checkpoints.save(1, first, {"step": 1}, {})
        checkpoints.close()
        expected = jax.device_get(step(first, on_mesh(batch)))
    mesh = mesh_of(fsdp=2, expert=2, context=2)
    with jax.set_mesh(mesh):
        _, state, _ = Checkpoints(tmp_path, keep=1, every=1).restore(abstract_state(c, mesh))
        gate = state.params["periods"]["L0"]["mlp"]["gate"]
        assert gate.sharding.shard_shape(gate.shape) == (1, 8, D // 4, 24)
        got = jax.device_get(step(state, on_mesh(batch)))
    assert_close(got, expected, 1e-4)


@pytest.mark.slow
def test_decoding_on_a_mesh_of_experts_answers_as_one_device_does():
    c, prompts = with_experts(), [[5, 6, 7], list(range(40, 61))]
    answers = []
    for sizes in ({}, {"expert": 4, "tensor": 2}):
        with jax.set_mesh(mesh_of(**sizes)):
            engine = Engine(random_params(c.model), c, EngineOptions(chunk=16), execution=BLOCKED)
            answers.append(engine.generate(prompts, 5))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_device_holds_its_own_experts_and_its_part_of_all_other_weights():
    model = with_experts().model

    def shards(layer):
        return jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), layer)

    with jax.sharding.use_abstract_mesh(abstract_mesh(fsdp=2, expert=4, context=2, tensor=2)):
        params = abstract_params(model)
        weights = jax.eval_shape(lambda params: unstacked(model, params, "float32"), params)
    trained, inferring = shards(params["periods"]["L0"]), shards(weights["layers"][0])
    assert trained["mlp"]["gate"] == (1, 4, D // 4, 12) and trained["mlp"]["down"] == (1, 4, 12, D // 4)
    assert trained["mlp"]["router"] == (1, D // 16, 16) and trained["mlp"]["bias"] == (1, 16)
    assert trained["attention"]["q"] == (1, D // 16, 2, 8) and inferring["attention"]["q"] == (D // 2, 2, 8)
    assert inferring["mlp"]["gate"] == (4, D // 2, 12) and inferring["mlp"]["router"] == (D // 2, 16)


def test_a_layer_sends_tokens_and_not_experts_and_no_device_has_the_hidden_activations_of_all_tokens():
    mesh = mesh_of(data=2, expert=4)
    with jax.set_mesh(mesh):
        _, graph, state = layer_of(experts=4, top_k=2, d_ff=512)
        x_BTD, seg_BT = inputs()

        def output(state, x_BTD):
            return nnx.merge(graph, state)(x_BTD, seg_BT, None)[0]

        text = jax.jit(output).lower(state, x_BTD).compile().as_text()
        tokens, received = seg_BT.size // 8, {}
        for x in collectives(text, mesh.shape):
            received[x.kind, x.axes] = received.get((x.kind, x.axes), 0) + x.total
        assert biggest_array(jax.grad(lambda *args: output(*args).sum(), (0, 1)), state, x_BTD) < 4 * tokens * 512
    sent, router = 3 * tokens * 4, 3 * (D // 4) * 4 * 4
    assert received["all-gather", ("expert",)] == sent * (D + 2 * 2) + router  # activations, gates and indices of experts
    assert received["reduce-scatter", ("expert",)] == sent * D
    assert set(received) <= {("all-gather", ("expert",)), ("reduce-scatter", ("expert",)), ("all-reduce", ("data",))}


def test_experts_that_do_not_divide_over_the_axis_are_refused():
    with pytest.raises(ValueError, match="experts 16 does not split over 3 expert shards; use 15 or 18, or mesh.expert=1"):
        fit.check_model(with_experts({"model.pattern": "L"}).model, {"fsdp": 1, "tensor": 1, "expert": 3})
