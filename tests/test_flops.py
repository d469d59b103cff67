"""The costs of a config are those of counting: pairs by the reference mask, products by the compiler, bytes by token."""

import importlib
import math

import jax
import numpy as np
import pytest
from conftest import BLOCKED, batch_of, tiny

from configs import base
from hybrid_attn import config
from hybrid_attn.kernels.reference import visible_BTS
from hybrid_attn.model import abstract_params, flops, losses
from hybrid_attn.model.attention import attended_pairs
from hybrid_attn.parallel.mesh import TOKENS_BT, abstract_mesh
from hybrid_attn.train import cost

KINDS = {
    "L": {"window": 7, "rope_theta": 100.0},
    "C": {"chunk": 7, "rope_theta": 100.0, "gate": "projection"},
    "G": {"gate": "head"},
}


def size(name, size):
    return config.build(importlib.import_module(f"configs.{name}").get_config(size)).model


@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 14, 30])
def test_attended_pairs_are_those_of_the_reference_mask(letter, length):
    kind = tiny(**KINDS).model.kinds[letter]
    positions = np.arange(length)[None]
    segments = np.ones_like(positions) if kind.chunk is None else 1 + positions // kind.chunk
    counted = visible_BTS(positions, positions, segments, segments, kind.window).sum()
    assert attended_pairs(kind, length) == counted


@pytest.mark.parametrize("length", [1, 6, 7, 8, 30])
def test_the_forward_passes_of_decoded_tokens_are_that_of_their_sequence(length):
    model = tiny(**KINDS).model
    decoded = sum(flops.decode_flops(model, n) for n in range(1, length + 1))
    assert decoded == pytest.approx(length * flops.forward_flops_per_token(model, length))


def test_forward_flops_are_those_that_the_compiler_counts():
    length = 256
    kinds = {letter: KINDS[letter] | near for letter, near in {"L": {"window": 200}, "C": {"chunk": 128}, "G": {}}.items()}
    changes = {"d_model": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "d_ff": 640, "num_layers": 3}
    changes = {f"model.{name}": value for name, value in changes.items()} | {"model.pattern": "LCG"}
    model = tiny(changes, **kinds).model
    assert model.num_periods == 1  # XLA counts the body of a loop once
    execution = BLOCKED._replace(kernel="reference", loss_chunk=length, mlp_chunk=None)
    mesh = abstract_mesh()
    with jax.sharding.use_abstract_mesh(mesh):
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, TOKENS_BT))
            for name, x in batch_of("a" * length).items()
        }
        step = jax.jit(losses, static_argnums=(0, 3)).trace(model, abstract_params(model), batch, execution)
    counted = step.lower(lowering_platforms=("cpu",)).cost_analysis()["flops"]
    seen = sum(attended_pairs(model.kinds[letter], length) for letter in model.layers)
    unseen = 3 * length**2 - seen  # the reference kernel computes them all
    wanted = length * flops.forward_flops_per_token(model, length) + 4 * model.num_heads * model.head_dim * unseen
    assert counted == pytest.approx(wanted, rel=0.02)


def test_a_training_step_costs_three_forward_passes():
    model = tiny().model
    assert flops.train_flops_per_token(model, 100) == 3 * flops.forward_flops_per_token(model, 100)


def test_a_step_counts_the_reference_and_no_gradients_of_weights_that_do_not_train():
    stage = {"steps": 1, "seq_len": 100, "batch": 1, "microbatches": 1, "mixture": {}}
    dpo = {"objective": "dpo", "preference": base.preference()}
    c = tiny({"stages": [stage, stage | dpo, stage | dpo | {"trainable": ("embed", "*/mlp/*")}], "model.adapter.type": "lora"})
    plain = tiny({"stages": [stage | dpo]}).at(0)
    forward, adapted = (flops.forward_flops_per_token(x.model, 100) for x in (plain, c))
    assert cost.flops_per_token(plain) == 4 * forward
    of_base = flops.product_flops_per_token(plain.model)
    assert cost.flops_per_token(c.at(0)) == 3 * adapted - of_base
    assert cost.flops_per_token(c.at(1)) == 4 * adapted - of_base
    attention = 2 * 32 * 8 * (4 + 2 + 2 + 4)
    assert of_base == 2 * (attention + 2 * 3 * 32 * 48 + 384 * 32)
    assert cost.flops_per_token(c.at(2)) == pytest.approx(4 * adapted - 2 * attention - (adapted - forward))
    assert cost.described(plain) == "3 x forward and 1 x forward of other parameters"
    assert cost.described(c.at(0)) == "3 x forward, without gradients of fixed weights"


@pytest.mark.parametrize(
    "name, size_name, number, tolerance",
    [("hybrid_8k", "8b", 8.028e9, 1e-3), ("rope_8k", "8b", 8.028e9, 1e-3), ("hybrid_8k", "1b", 1.0e9, 0.2)]
    + [("hybrid_8k", "150m", 1.5e8, 0.2)],
)
def test_sizes_have_the_parameters_of_their_names(name, size_name, number, tolerance):
    assert flops.parameters(size(name, size_name)) == pytest.approx(number, rel=tolerance)


def test_parameters_are_counted_as_by_hand():
    model = tiny(
        {"model.num_layers": 5, "model.tie_embeddings": False}, **KINDS | {"G": {"gate": "head", "qk_norm": "rms"}}
    ).model
    layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48 + 32
    assert flops.parameters(model) == 2 * 384 * 32 + 32 + 5 * layer + 2 * (32 * 4 + 2 * 8)
    assert 0.5e6 <= flops.parameters(size("hybrid_8k", "small")) <= 2e6


@pytest.mark.parametrize("length, ratio", [(8, 0.625), (32, 0.344), (128, 0.273), (256, 0.262)])
def test_the_hybrid_caches_this_share_of_the_keys_and_values_of_full_attention(length, ratio):
    hybrid, full = (flops.cache_bytes(size(name, "8b"), length * 1024) for name in ("hybrid_8k", "rope_8k"))
    assert full == length * 1024 * 32 * 2 * 8 * 128 * 2
    assert hybrid / full == pytest.approx(ratio, abs=5e-4)


def test_a_cache_holds_a_window_or_a_chunk_and_no_more():
    model = tiny({"model.pattern": "LCG", "model.num_layers": 3}, **KINDS).model
    token = 2 * 2 * 8 * 4
    assert flops.cache_bytes(model, 5, 4) == 15 * token
    assert flops.cache_bytes(model, 40, 4) == (7 + 7 + 40) * token
    assert math.prod((7, token)) == flops.cache_bytes(tiny({"model.pattern": "L", "model.num_layers": 1}, **KINDS).model, 99, 4)
