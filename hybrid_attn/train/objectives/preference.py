"""Direct alignment: losses of pairs of completions by their log-probabilities under the model and a frozen reference.

Delta is log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l), for the chosen completion y_w and the rejected y_l of a prompt. The first
three losses are those of arXiv 2410.11677, section 2, the last two those of the library TRL under the same names. `FORMS` says
whether the log-probability of a completion is the sum over its tokens or their mean, as there; `mean_log_probs` of
`stages[i].preference` changes that. To each, `nll` times -log pi(y_w) is added.

Both halves of a pair lie in one packed sequence (`model/documents.py`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.config import Preference, StageConfig
from hybrid_attn.data.packed import STORED, has_stored_reference
from hybrid_attn.model import Execution, losses, losses_and_aux
from hybrid_attn.model.documents import halves_of_pairs
from hybrid_attn.train.objectives import next_token
from hybrid_attn.train.objectives.objective import Batch, Extra, Objective, reads
from hybrid_attn.train.trainable import joined
from hybrid_attn.trees import check

REFERENCE = "reference"


class Halves(NamedTuple):
    """A number of each pair [...] for the chosen and for the rejected completion: log-probabilities, or tokens."""

    chosen: jax.Array
    rejected: jax.Array


def log_ratios(model: Halves, reference: Halves) -> jax.Array:
    """Delta of each pair."""
    return (model.chosen - reference.chosen) - (model.rejected - reference.rejected)


def dpo(settings: Preference, model: Halves, reference: Halves) -> jax.Array:
    """-log sigmoid(beta Delta); with label_smoothing e, 1 - e of it and e of -log sigmoid(-beta Delta)."""
    logits = settings.beta * log_ratios(model, reference)
    return (1 - settings.label_smoothing) * jax.nn.softplus(-logits) + settings.label_smoothing * jax.nn.softplus(logits)


def ipo(settings: Preference, model: Halves, reference: Halves) -> jax.Array:
    """(beta Delta - 1/2)^2, where the paper writes tau for beta."""
    return jnp.square(settings.beta * log_ratios(model, reference) - 0.5)


def hinge(settings: Preference, model: Halves, reference: Halves) -> jax.Array:
    """max(0, margin - log pi(y_w)/pi(y_l)) + alpha log(1 + exp(1 - log pi(y_w)/ref(y_w))) (SLiC)."""
    regulariser = jax.nn.softplus(1 - (model.chosen - reference.chosen))
    return jax.nn.relu(settings.margin - (model.chosen - model.rejected)) + settings.alpha * regulariser


def trl_ipo(settings: Preference, model: Halves, reference: Halves) -> jax.Array:
    """(Delta - 1/(2 beta))^2."""
    return jnp.square(log_ratios(model, reference) - 1 / (2 * settings.beta))


def trl_hinge(settings: Preference, model: Halves, reference: Halves) -> jax.Array:
    """max(0, 1 - beta Delta)."""
    return jax.nn.relu(1 - settings.beta * log_ratios(model, reference))


class Form(NamedTuple):
    """A loss of each pair, the settings of `Preference` that it reads, and whether log-probabilities are means over tokens.

    The indicator is that of arXiv 2410.11677, section 5; TRL's losses have those of the paper's losses of the same name.
    """

    loss: Callable[[Preference, Halves, Halves], jax.Array]
    reads: tuple[str, ...]
    means: bool = False
    indicator: str = "entropy_bits"


FORMS = {
    "dpo": Form(dpo, ("beta", "label_smoothing")),
    "ipo": Form(ipo, ("beta",)),
    "hinge": Form(hinge, ("margin", "alpha"), means=True, indicator="mass"),
    "trl_ipo": Form(trl_ipo, ("beta",), means=True),
    "trl_hinge": Form(trl_hinge, ("beta",), indicator="mass"),
}
UNSET = {"beta": None, "margin": None, "alpha": None, "label_smoothing": 0.0}


def check_settings(config: StageConfig) -> None:
    """ValueError unless the stage has the settings that its objective reads, and no others: it has no z-loss."""
    reads("preference")(config)
    name, settings = config.objective, config.preference
    field, form = f"stages[{config.index}].preference", FORMS[name]
    shown = [f"{key}=..." for key in form.reads if UNSET[key] is None] + ["beta=None"] * ("beta" not in form.reads)
    check(settings is not None, f"the objective {name!r} needs {field}; use base.preference({', '.join(shown)})")
    cure = f'give stages[{config.index}].override = base.override({{"optim.z_loss": 0.0}})'
    check(config.optim.z_loss == 0, f"the objective {name!r} does not read optim.z_loss={config.optim.z_loss}; {cure}")
    for key, unset in UNSET.items():
        value = getattr(settings, key)
        if key in form.reads:
            check(value is not None, f"{field}.{key} is None, and the objective {name!r} needs a number")
        else:
            check(value == unset, f"{field}.{key}={value}, and the objective {name!r} does not read it; use {unset}")


def pairs(values_BT: jax.Array, batch: Batch) -> Halves:
    """The sums of `values_BT` over the trained tokens of both halves of each pair [B, T // 2]; 0 where there is none."""
    return Halves(*halves_of_pairs(values_BT * batch["weights"], batch["segments"]))


def tokens_of(batch: Batch) -> Halves:
    """The numbers of trained tokens of both halves of each pair [B, T // 2]; 0 where there is none."""
    return pairs(jnp.ones_like(batch["weights"]), batch)


def is_pair(batch: Batch) -> jax.Array:
    """Whether there is a pair [B, T // 2]."""
    return tokens_of(batch).rejected > 0


def weight(config: StageConfig, batch: Batch) -> jax.Array:
    """The number of pairs."""
    return is_pair(batch).sum().astype(jnp.float32)


def reference_sums(config: StageConfig, params: dict, extras: Mapping, batch: Batch, execution: Execution) -> Halves:
    """The log-probabilities of the completions of each pair under the reference, summed over their tokens."""
    if has_stored_reference(config):
        return Halves(*halves_of_pairs(batch["references"], batch["segments"]))
    frozen = jax.lax.stop_gradient(joined(extras[REFERENCE], params))  # what the stage does not train is that of the model
    nll_BT, _ = losses(config.model, frozen, batch, execution._replace(statistics=False))
    return pairs(-nll_BT, batch)


def in_form(config: StageConfig, sums: Halves, batch: Batch) -> Halves:
    """The log-probabilities of the completions of each pair, of the sums over their tokens, as sums or means."""
    means = config.preference.mean_log_probs
    if not (FORMS[config.objective].means if means is None else means):
        return sums
    return Halves(*(x / jnp.maximum(n, 1.0) for x, n in zip(sums, tokens_of(batch), strict=True)))


def loss(config: StageConfig, params: dict, extras: Mapping, batch: Batch, execution: Execution) -> tuple[jax.Array, dict]:
    """The sum over the pairs, and sums of what `metrics` shows."""
    nll_BT, _, aux = losses_and_aux(config.model, params, batch, execution)
    model = in_form(config, pairs(-nll_BT, batch), batch)
    reference = in_form(config, reference_sums(config, params, extras, batch, execution), batch)
    settings, exists = config.preference, is_pair(batch)
    of_pairs = FORMS[config.objective].loss(settings, model, reference) - settings.nll * model.chosen
    delta = log_ratios(model, reference)

    def total(values):
        return jnp.where(exists, values, 0.0).sum()

    sums = {"chosen": total(model.chosen), "rejected": total(model.rejected), "log_ratio": total(delta)}
    sums |= {"right": total(delta > 0), "pairs": total(1.0), "nll": (batch["weights"] * nll_BT).sum()}
    return total(of_pairs), sums | aux


def metrics(sums: dict, batch: Batch) -> dict:
    """Means over the pairs: log-probabilities, Delta, and the share of pairs whose Delta is above 0; and bits per byte."""
    number = jnp.maximum(sums["pairs"], 1.0)
    names = {"chosen_log_prob": "chosen", "rejected_log_prob": "rejected", "log_ratio": "log_ratio", "pair_accuracy": "right"}
    return {name: sums[key] / number for name, key in names.items()} | next_token.metrics(sums, batch)


FROZEN = Extra(init=lambda params: params, update=lambda frozen, params, sums, step: frozen, of_stage=True)
OBJECTIVE = Objective(
    weight, loss, metrics, next_token.FIELDS, {REFERENCE: FROZEN}, check_settings, paired=True, forward_passes=1
)
PREFERENCE = {name: OBJECTIVE._replace(indicator=form.indicator) for name, form in FORMS.items()}


def with_stored_reference(objective: Objective) -> Objective:
    """An objective of pairs whose batches have the log-probabilities of the reference."""
    return objective._replace(extras={}, fields=(*objective.fields, *STORED), forward_passes=0)
