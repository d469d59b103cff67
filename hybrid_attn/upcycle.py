"""Makes mixtures of experts of dense models: which parameter of a mixture comes from which tensors of which models.

sparse (arXiv 2212.05055): every expert is a copy of the feed-forward of one model. btx (arXiv 2403.07816): experts are the
feed-forwards of several models, all else is their mean. bam (arXiv 2408.08274): attentions become experts too. nexus (arXiv
2408.15901): the feed-forward of the first model, the seed, computes every token, and the router is projected from domain
embeddings, or is a matrix as in the others. Routers are new everywhere.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn import merge, trees
from hybrid_attn.config_model import Model
from hybrid_attn.configs import base
from hybrid_attn.trees import check

Source = tuple[int, str]  # the number of a model, and the name of one of its parameters
MATRICES = "gate|up|down"  # of an expert
DOMAINS = "mlp/router/domains"
BIAS = "/mlp/bias"  # of the router, by which experts are chosen
OF_GATED = "d_ff", "swiglu_limit", "swiglu_alpha"  # fields of a dense feed-forward, which its experts have too
MEAN, STACK, APPEND, APPEND_MEAN, COLUMN, NEW = "mean", "stack", "append", "append_mean", "column", "new"


class Origin(NamedTuple):
    """Where a parameter comes from: the `join` of tensors; of a MEAN by `weights`, if these are not equal."""

    join: str
    sources: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()

    def shape_of(self, source: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one layer's tensor of a source, from that of the parameter."""
        if self.join == STACK or (self.join == APPEND and source == 1):
            return shape[1:]
        if self.join == COLUMN:
            return (*shape[:-1], shape[-1] - 1)
        return (shape[0] - 1, *shape[1:]) if self.join in (APPEND, APPEND_MEAN, DOMAINS) else shape


class Recipe(NamedTuple):
    """Which models become experts, by their number, whose mean all else is, which one is `shared`; fields of the mixture."""

    experts: tuple[int, ...]
    averaged: tuple[int, ...]
    mlp: Mapping
    shared: int | None = None
    attention: bool = False


def sparse(models: int, experts: int) -> Recipe:
    check(models == 1, f"sparse makes experts of one model, not of {models}; use btx")
    return Recipe((0,) * experts, (0,), {"top_k": min(2, experts)})


def btx(models: int, experts: int) -> Recipe:
    check(models >= 2, f"btx makes an expert of each model, and --dense names {models}; name 2 or more, or use sparse")
    return Recipe(tuple(range(models)), tuple(range(models)), {"top_k": 2})


def bam(models: int, experts: int) -> Recipe:
    check(models >= 2, f"bam makes an expert of each model, and --dense names {models}; name 2 or more")
    return Recipe(tuple(range(models)), tuple(range(models)), {"top_k": 1, "renormalise": False}, attention=True)


def nexus(models: int, experts: int) -> Recipe:
    check(models >= 3, f"nexus needs the seed and 2 experts, and --dense names {models} models; name 3 or more")
    mlp = {"top_k": 1, "renormalise": False, "shared_experts": 1, "balance_loss": 0.05}
    return Recipe(tuple(range(1, models)), tuple(range(1, models)), mlp, shared=0)


METHODS: dict[str, Callable[[int, int], Recipe]] = {"sparse": sparse, "btx": btx, "bam": bam, "nexus": nexus}


def check_dense(model: Model, name: str) -> None:
    """ValueError where a layer type has experts already, or matrices are factorised."""
    problem = f"{name}: model.low_rank.rank_fraction={model.low_rank.rank_fraction}"
    check(model.low_rank.rank_fraction is None, f"{problem}, and only matrices become those of a mixture; export and import it")
    for letter in sorted(set(model.layers)):
        layer_type = model.kinds[letter]
        is_dense = layer_type.mlp.type == "gated" and layer_type.mixer == "attention"
        parts = f"mixer={layer_type.mixer!r} and mlp.type={layer_type.mlp.type!r}"
        check(is_dense, f"{name}: layer type {letter} has {parts}; a dense model has 'attention' and 'gated'")


def experts_of(model: Model, method: str, name: str) -> tuple[int, int | None]:
    """The experts of a mixture, and the size of the domain embeddings of a projected router; ValueError for another model."""
    layer_types = [model.kinds[letter] for letter in sorted(set(model.layers))]
    for letter, x in zip(sorted(set(model.layers)), layer_types, strict=True):
        parts = f"mixer={x.mixer!r}, mlp.type={x.mlp.type!r} and mlp.shared_experts={x.mlp.shared_experts}"
        fits = x.mixer == "attention" and x.mlp.type == "moe" and bool(x.mlp.shared_experts) == (method == "nexus")
        check(fits, f"{name} is no mixture of {method}: layer type {letter} has {parts}")
    numbers = {(x.mlp.experts, x.mlp.domain_dim) for x in layer_types}
    check(len(numbers) == 1, f"{name} has layer types of {sorted(numbers, key=str)} experts and sizes of domain embeddings")
    return numbers.pop()


def mixture(values: Mapping, recipe: Recipe, changes: Mapping) -> dict:
    """The nested dict of the config of the mixture, from that of a dense model; `changes` are those of its feed-forwards."""

    def mixed(kind: Mapping) -> dict:
        fields = {name: kind["mlp"][name] for name in OF_GATED} | {"experts": len(recipe.experts), **recipe.mlp, **changes}
        attention = {"mixer": "attention_experts", "attention_experts": len(recipe.experts)} if recipe.attention else {}
        return {**kind, **attention, "mlp": trees.plain(base.moe(**fields))}

    model = values["model"]
    return {**values, "model": {**model, "kinds": {letter: mixed(kind) for letter, kind in model["kinds"].items()}}}


def extended(values: Mapping) -> dict:
    """The nested dict of a config with one more expert in each layer type."""

    def with_one_more(kind: Mapping) -> dict:
        return {**kind, "mlp": {**kind["mlp"], "experts": kind["mlp"]["experts"] + 1}}

    model = values["model"]
    return {**values, "model": {**model, "kinds": {letter: with_one_more(kind) for letter, kind in model["kinds"].items()}}}


def with_sources(values: Mapping, added: Mapping, experts: int) -> dict:
    """The nested dict of a config whose last stage has the sources of that of another config, too, so that both are evaluated.

    A name that another source has gets the number of experts.
    """
    sources, stages = dict(values["data"]["sources"]), [*values["stages"]]
    mixture = dict(stages[-1]["mixture"])
    for name, weight in added["stages"][-1]["mixture"].items():
        source = added["data"]["sources"][name]
        unique = name if sources.get(name, source) == source else f"{name}_{experts}"
        sources[unique], mixture[unique] = source, weight
    stages[-1] = {**stages[-1], "mixture": mixture}
    return {**values, "data": {**values["data"], "sources": sources}, "stages": stages}


def origin(recipe: Recipe, name: str) -> Origin:
    """Where the parameter `name` of a mixture comes from."""
    if name.endswith(DOMAINS):
        return Origin(DOMAINS)
    if re.search("/(mlp|attention_experts)/router(/|$)", name):
        return Origin(NEW)
    if re.search(f"/mlp/({MATRICES})$", name):
        return Origin(STACK, tuple((model, name) for model in recipe.experts))
    if "/mlp/shared/" in name:
        return Origin(MEAN, ((recipe.shared, name.replace("/shared/", "/")),))
    if of_expert := re.fullmatch(r"(.*)/attention_experts/expert(\d+)/(.*)", name):
        layer, number, leaf = of_expert.groups()
        return Origin(MEAN, ((recipe.experts[int(number)], f"{layer}/attention/{leaf}"),))
    dense = name.replace("/attention_experts/shared/", "/attention/")
    return Origin(MEAN, tuple((model, dense) for model in recipe.averaged))


def origin_of_added(name: str, experts: int) -> Origin:
    """`origin` in a mixture (model 0) of so many experts to which that of a dense model (1) is added.

    What belongs to no expert is (1 - l) of the mixture and l of the new model, with l = 1 / (n + 1). The projection of the
    router and the shared expert stay; a router that is a matrix gets a column of new numbers. The bias of the new expert is the
    mean of the others': experts are chosen by differences of biases, so a number that all of them have must neither favour it
    nor keep it from tokens, as zero would.
    """
    if name.endswith("/mlp/router"):
        return Origin(COLUMN, ((0, name),))
    if name.endswith(DOMAINS):
        return Origin(DOMAINS, ((0, name),))
    if name.endswith(BIAS):
        return Origin(APPEND_MEAN, ((0, name),))
    if re.search("/mlp/(router|shared)/", name):
        return Origin(MEAN, ((0, name),))
    if re.search(f"/mlp/({MATRICES})$", name):
        return Origin(APPEND, ((0, name), (1, name)))
    return Origin(MEAN, ((0, name), (1, name)), (experts / (experts + 1), 1 / (experts + 1)))


def joined(origin: Origin, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The parameter of one layer from its tensors."""
    if origin.join == STACK:
        return np.stack(tensors)
    if origin.join == APPEND:
        return np.concatenate([tensors[0], tensors[1][None]])
    if origin.join == APPEND_MEAN:
        return np.append(tensors[0], tensors[0].mean(dtype=np.float64).astype(np.float32))
    return merge.merge(merge.Recipe("linear", origin.weights or (1.0,) * len(tensors)), tensors, None, None)


def domain_embedding(counts_V: np.ndarray, embed_VD: np.ndarray) -> np.ndarray:
    """The mean embedding [D] of tokens that occur so often, over its root mean square."""
    mean_D = counts_V.astype(np.float64) @ embed_VD.astype(np.float64) / counts_V.sum()
    return (mean_D / np.sqrt(np.square(mean_D).mean())).astype(np.float32)


def check_domains(domains_Em: np.ndarray, experts: int, domain_dim: int | None, name: str) -> None:
    """ValueError for embeddings of another number of experts, or of another size than those of a mixture."""
    shape = "x".join(map(str, domains_Em.shape))
    expected = f"{experts} x {'any size' if domain_dim is None else domain_dim}"
    fits = domains_Em.ndim == 2 and len(domains_Em) == experts and domain_dim in (None, domains_Em.shape[1])
    check(fits, f"{name} has domain embeddings of {shape}, and {expected} are needed: a row for each expert")
    check(bool(np.isfinite(domains_Em).all()), f"{name} has numbers that are not finite")
