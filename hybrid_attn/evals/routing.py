"""Routing: which experts the tokens of each source go to, in every layer that has some."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.evals import evaluation
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, report_of
from hybrid_attn.evals.records import COUNT, NAME, SHARE, SIZE, Kind, grouped, list_of, mean_of, number
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution, attention_experts, losses_and_aux, moe
from hybrid_attn.model.transformer import STATISTICS, layer_paths
from hybrid_attn.parallel.mesh import batch_shards

# What has experts in a layer: the names of their shares and of their entropy.
PARTS = {
    "feed-forward": (moe.SHARES, "router_entropy_bits"),
    "attention": (attention_experts.SHARES, "gate_entropy_bits"),
}
MOST_EXPERTS = 2**16  # of a layer
ROUNDING = 1e-3  # of a sum of shares


def _sums_to_one(value: object) -> bool:
    return list_of(SHARE, 1).holds(value) and len(value) <= MOST_EXPERTS and abs(sum(value) - 1) < ROUNDING


SHARES = Kind("a list of shares that sum to 1", _sums_to_one)


def records_of(eval_model: EvalModel, spec: Spec) -> Iterator[dict]:
    """A record for the experts of each layer, feed-forwards or attentions, over the real tokens of sequences of `spec`.

    `shares` has a number for each expert, which sum to 1: of feed-forwards the share of the copies of tokens, of attentions the
    mean gate. `load` is the largest of them over their mean. `entropy_bits` is that of a token's probabilities or gates.
    """
    model = eval_model.model
    sequences = PackedSequences(spec.documents, spec.length, None, eval_model.tokenizer.byte_lengths)
    count, batch_size = -(-spec.tokens // spec.length), batch_shards(eval_model.mesh)
    measure = functools.partial(_means, model, eval_model.execution, eval_model.params)
    batches = heldout_batches(sequences, count, batch_size, eval_model.mesh)
    tokens, means = zip(*(jax.device_get(measure(batch)) for batch in batches), strict=True)
    for i, letter in enumerate(model.layers):
        of_layer = {name: np.average([x[i][name] for x in means], 0, tokens) for name in means[0][i]}
        check_finite(np.concatenate([np.ravel(x) for x in of_layer.values()] or [[]]), f"the routing of layer {i}")
        for experts, (shares, entropy) in PARTS.items():
            if shares in of_layer:
                record = {"layer": i, "kind": letter, "experts": experts, "length": spec.length, "tokens": int(sum(tokens))}
                record |= {"shares": of_layer[shares].tolist(), "load": float(of_layer[shares].max() * len(of_layer[shares]))}
                yield record | {"entropy_bits": float(of_layer[entropy])}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _means(model: Model, execution: Execution, params: dict, batch: dict) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """How many real tokens a batch has, and of each layer the means over them that `PARTS` names, on every device."""
    _, _, aux = losses_and_aux(model, params, batch, execution._replace(statistics=True))
    names, means = sum(PARTS.values(), ()), []
    for group, name, period in layer_paths(model):
        of_layer = aux[STATISTICS][group][name].aux
        of_layer = {x: of_layer[x] for x in names if x in of_layer}
        means.append({x: value[period] if group == "periods" else value for x, value in of_layer.items()})
    return jax.tree.map(lambda x: jax.reshard(x, P()), ((batch["segments"] > 0).sum(), means))


def has_experts(model: Model) -> bool:
    kinds = [model.kinds[letter] for letter in model.layers]
    return any(kind.mlp.type == "moe" or kind.mixer == "attention_experts" for kind in kinds)


def parts(context: EvalContext, settings: Settings) -> list[str]:
    """The sources of documents, if the model has experts."""
    return evaluation.texts(context, settings) if has_experts(context.eval_model.model) else []


def without_experts(context: EvalContext) -> tuple[str, str]:
    if has_experts(context.eval_model.model):
        return evaluation.without_documents(context)
    return "experts", "no layer of the model has any"


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    spec = Spec(context.heldout[unit.part], unit.length, settings.tokens)
    return evaluation.measured_of_source(unit, records_of(context.eval_model, spec))


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    """Means over the layers of each type."""
    for (source, experts, letter), layers in grouped(records, itemgetter("source", "experts", "kind")).items():
        load, entropy = (mean_of(layers, name) for name in ("load", "entropy_bits"))
        of = f"{source}, layers {letter}"
        yield Line(f"load of {experts} experts (largest / mean)", of, f"{load:.2f}", number=f"{entropy:.2f} bits")


EVALUATION = Evaluation(
    name="routing",
    parts=parts,
    measure=measure,
    fields={
        **{"source": NAME, "length": SIZE, "layer": COUNT, "kind": NAME, "tokens": SIZE, "shares": SHARES},
        **{"experts": Kind(" or ".join(PARTS), lambda value: value in (*PARTS,)), "load": number(0), "entropy_bits": number()},
    },
    headline=Headline(
        lambda records: mean_of(records, "load"), "routing_load_largest_over_mean", "largest load {:.2f} x mean", False
    ),
    report=report_of("routing"),
    lines=lines,
    section_order=7,
    flags=("tokens", "heldout"),
    empty=without_experts,
    check_fits=evaluation.check_sequence,
)
