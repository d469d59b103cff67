"""Optimisers."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hybrid_attn.config import Config, Model, Optim, StageConfig
from hybrid_attn.model import specs
from hybrid_attn.model.params import MATRIX, ParamSpec
from hybrid_attn.model.transforms.low_rank import frobenius_gradients
from hybrid_attn.train import trainable
from hybrid_attn.train.muon import rate as rate_of_muon
from hybrid_attn.train.muon import scale_by_muon
from hybrid_attn.train.schedule import schedule
from hybrid_attn.trees import choice


def chained(
    scaling: optax.GradientTransformation,
    optim: Optim,
    specs: dict,
    rate: optax.Schedule,
    factor: Callable[[ParamSpec], float] = lambda spec: spec.rate,
):
    """Clipping by the global norm, `scaling`, decoupled weight decay of the matrices (arXiv 1711.05101), and the learning rate.

    A step takes rate * weight_decay of a matrix off it; with independent decay (arXiv 2309.14322) rate / lr * weight_decay.
    The `factor` of µP on the rate of a weight leaves its decay alone: every width forgets in the same number of steps.
    """
    factors = jax.tree.map(factor, specs)
    decay = optim.weight_decay / optim.lr if optim.independent_decay else optim.weight_decay
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        _multiplied(scaling, factors),
        _decayed(optim, decay, specs),
        optax.scale_by_learning_rate(rate),
    )


def _decayed(optim: Optim, decay: float, specs: dict) -> optax.GradientTransformation:
    """Adds `decay` times each matrix to its update, and of factors times what `optim.low_rank_decay` says."""
    each = optax.add_decayed_weights(decay, mask=jax.tree.map(lambda spec: spec.decay, specs))
    if optim.low_rank_decay == "l2":
        return each

    def update(updates, state, params):
        return each.update(updates, state, frobenius_gradients(specs, params))

    return optax.GradientTransformation(each.init, update)


def _multiplied(scaling: optax.GradientTransformation, factors: dict) -> optax.GradientTransformation:
    """`scaling` with its updates times `factors`, and with the same state."""
    if all(factor == 1.0 for factor in jax.tree.leaves(factors)):
        return scaling

    def update(updates, state, params=None):
        updates, state = scaling.update(updates, state, params)
        return jax.tree.map(operator.mul, factors, updates), state

    return optax.GradientTransformation(scaling.init, update)


def _adam(optim: Optim) -> optax.GradientTransformation:
    return optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.moment_dtype)


def adamw(optim: Optim, specs: dict, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    return chained(_adam(optim), optim, specs, rate)


def muon(optim: Optim, specs: dict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for matrices, and AdamW for embeddings, norms and scalars of heads; both take the same learning rate without µP."""
    is_matrix = jax.tree.map(lambda spec: spec.group == MATRIX, specs)
    matrices = jax.tree.map(lambda spec: spec if spec.group == MATRIX else optax.MaskedNode(), specs)
    transforms = {True: scale_by_muon(matrices, optim.momentum, optim.moment_dtype), False: _adam(optim)}
    scaling = optax.partition(transforms, is_matrix)
    return chained(scaling, optim, specs, rate, lambda spec: rate_of_muon(spec) if spec.group == MATRIX else spec.rate)


def lion(optim: Optim, specs: dict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675); its rate is about a tenth of AdamW's, and its decay ten times as large."""
    return chained(optax.scale_by_lion(optim.b1, optim.b2, optim.moment_dtype), optim, specs, rate)


def adafactor(optim: Optim, specs: dict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) without momentum; the root mean square of an update is at most the rate.

    Where the two largest axes of an array have 128 entries or more, it keeps the sums of squares over each of them, not all
    squares.
    """
    return chained(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), optim, specs, rate)


# From the optimiser's part of a config, the `ParamSpec` of every parameter and the learning rate of every step.
OPTIMISERS: dict[str, Callable[[Optim, dict, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "adafactor": adafactor,
}


def optimiser(c: Config | StageConfig) -> optax.GradientTransformation:
    """The optimiser that `c.optim.optimiser` names, with arrays for the parameters of `trainable.has_state`.

    ValueError for one that is not in `OPTIMISERS`.
    """
    has_state = trainable.has_state(c, specs(c.model))
    trained = jax.tree.map(lambda spec, yes: spec if yes else optax.MaskedNode(), specs(c.model), has_state)
    tx = _of_trained(c, trained)
    return tx if all(jax.tree.leaves(has_state)) else optax.partition({True: tx, False: optax.set_to_zero()}, has_state)


def _of_trained(c: Config | StageConfig, all_specs: dict) -> optax.GradientTransformation:
    """The optimiser of the parameters that have a spec."""
    make = choice("optim.optimiser", c.optim.optimiser, OPTIMISERS)
    by_sign = jax.tree.map(lambda spec: spec.sign_rate is not None, all_specs)
    learned = jax.tree.map(lambda spec, sign: optax.MaskedNode() if sign else spec, all_specs, by_sign)
    learning = make(c.optim, learned, schedule(c.optim, c.pieces))
    if not any(jax.tree.leaves(by_sign)):
        return learning
    return optax.partition({True: optax.stateless(functools.partial(_sign_updates, all_specs)), False: learning}, by_sign)


def _sign_updates(specs: dict, grads: dict, params: dict) -> dict:
    def of(spec: ParamSpec, grad: jax.Array):
        return grad if spec.sign_rate is None else -spec.sign_rate * jnp.sign(grad)

    return jax.tree.map(of, specs, grads)


def without_biases(model: Model, grads: dict) -> dict:
    """The gradients without those of the biases of routers, which are numbers of tokens: None in their place."""
    return jax.tree.map(lambda spec, grad: grad if spec.sign_rate is None else None, specs(model), grads)
