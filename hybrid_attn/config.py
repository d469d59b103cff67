"""The configuration: frozen dataclasses that check themselves once, when they are built.

No field has a default here: `configs/base.py` holds every default with its unit and its reason.
`build` turns the nested mapping of a config file into a `Config` and names what does not fit.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrid_attn import trees
from hybrid_attn.trees import Table, check

REMAT = ("layer", "none", "attention", "offload")  # the first of each is for the kinds that a config does not name
CONTEXT = ("auto", "halo", "gather", "ring", "exchange")
EVALS = ("position", "recall", "needle", "ruler", "attention_mass", "key_tokens")  # that run in training
QUERIES = 6  # in a row of the task "recall", of three tokens each
HOPS = 3  # of a chain of the task "tracking", whose variables are one more; an assignment is three tokens


class RowForm(NamedTuple):
    """Of a task's rows: the most pairs (None: it has none), and the least tokens with and for each pair."""

    pairs: int | None
    tokens: int
    tokens_a_pair: int


TASKS = {
    "recall": RowForm(8, 3 * QUERIES, 2),
    "mqar": RowForm(127, 1, 4),
    "copy": RowForm(None, 3, 0),
    "tracking": RowForm(4, HOPS + 3, 3 * (HOPS + 1)),
}


def _one_of(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, choices))}{hint}")


def _check_positive(field: str, value: float | None) -> None:
    check(value is None or 0 < value < math.inf, f"{field}={value} must be positive and finite")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the length that they were trained at."""

    type: str
    factor: float
    original_len: int
    low: float
    high: float
    attention_factor: float | None

    def __post_init__(self):
        _one_of("rope_scaling.type", self.type, ("none", "linear", "ntk", "yarn", "llama3"))
        check(1 <= self.factor < math.inf, f"rope_scaling.factor={self.factor} must be at least 1")
        check(self.original_len >= 1, f"rope_scaling.original_len={self.original_len} must be at least 1 token")
        check(
            self.type not in ("yarn", "llama3") or self.low < self.high,
            f"rope_scaling.low={self.low} must be below rope_scaling.high={self.high}",
        )
        check(self.low > 0, f"rope_scaling.low={self.low} must be positive")
        _check_positive("rope_scaling.attention_factor", self.attention_factor)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """How the query's scale grows with the number of keys before it."""

    type: str
    scale: float
    length: int

    def __post_init__(self):
        _one_of("temperature.type", self.type, ("none", "log_length", "steps", "learned"))
        check(self.length >= 2, f"temperature.length={self.length} must be at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one letter of the pattern means: which keys a query sees and how positions enter."""

    window: int | None
    chunk: int | None
    rope_theta: float | None
    rope_fraction: float
    rope_scaling: RopeScaling
    qk_norm: str
    qk_norm_scope: str
    qk_norm_after_rope: bool
    scale: float | None
    softcap: float | None
    temperature: Temperature
    sink: bool
    gate: str

    def __post_init__(self):
        check(self.window is None or self.window >= 1, f"window={self.window} must be at least 1 (a query sees itself)")
        check(self.chunk is None or self.chunk >= 1, f"chunk={self.chunk} must be at least 1 token")
        for name in ("window", "chunk"):
            check(
                (getattr(self, name) or 0) < 2**31, f"{name}={getattr(self, name)} must be below 2^31; None is the whole prefix"
            )
        check(self.window is None or self.chunk is None, "a kind has a window or a chunk, not both")
        check(self.rope_theta is None or 1 < self.rope_theta < math.inf, f"rope_theta={self.rope_theta} must be above 1")
        check(
            self.rope_theta is not None or self.rope_scaling.type == "none",
            f"rope_scaling.type={self.rope_scaling.type!r} scales nothing without a rope_theta",
        )
        check(0 < self.rope_fraction <= 1, f"rope_fraction={self.rope_fraction} must be in (0, 1]")
        _one_of("qk_norm", self.qk_norm, ("none", "layernorm", "rms", "rms_plus1", "rms_weightless"))
        _one_of("qk_norm_scope", self.qk_norm_scope, ("head_dim", "head", "projection"))
        _one_of("gate", self.gate, ("none", "head", "projection"))
        check(
            not self.qk_norm_after_rope or (self.qk_norm != "none" and self.rope_theta is not None),
            "qk_norm_after_rope needs a qk_norm and a rope_theta",
        )
        for name in ("scale", "softcap"):
            _check_positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Model:
    vocab_size: int
    pattern: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    block: str
    norm: str
    norm_eps: float
    activation: str
    rope_layout: str
    tie_embeddings: bool
    embed_scale: float
    logit_scale: float
    logit_softcap: float | None
    init_std: float
    kinds: Table[str, LayerKind]

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        check(bool(self.pattern), "model.pattern is empty; write one letter for each layer of a period, as in 'LLLG'")
        for letter in self.pattern:
            check(
                letter in self.kinds,
                f"model.pattern={self.pattern!r} uses {letter!r}; model.kinds defines {', '.join(sorted(self.kinds))}",
            )
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
            f"use {self.num_heads // self.num_kv_heads * self.num_kv_heads or self.num_kv_heads} heads",
        )
        for letter in self.pattern:
            kind = self.kinds[letter]
            dims = rotated_dims(self, kind)
            check(
                kind.rope_theta is None or (dims >= 2 and dims % 2 == 0),
                f"model.kinds.{letter}: rope_fraction={kind.rope_fraction} of head_dim={self.head_dim} rotates {dims} "
                "dimensions; use an even number",
            )
            check(
                kind.rope_scaling.type != "ntk" or dims > 2,
                f"model.kinds.{letter}: ntk stretches by the dimension {dims}, and needs more than 2",
            )
        _one_of("model.block", self.block, ("parallel", "pre", "post", "sandwich"))
        _one_of("model.norm", self.norm, ("layernorm", "rms", "rms_plus1"))
        _one_of("model.activation", self.activation, ("silu", "gelu", "gelu_tanh"))
        _one_of("model.rope_layout", self.rope_layout, ("interleaved", "half"))
        for name in ("norm_eps", "embed_scale", "logit_scale", "logit_softcap", "init_std"):
            _check_positive(f"model.{name}", getattr(self, name))

    @property
    def layers(self) -> str:
        """The letter of each layer, in order."""
        return (self.pattern * -(-self.num_layers // len(self.pattern)))[: self.num_layers]

    @property
    def num_periods(self) -> int:
        """Whole repetitions of the pattern; the layers left over are the tail."""
        return self.num_layers // len(self.pattern)

    @property
    def tail(self) -> str:
        return self.layers[self.num_periods * len(self.pattern) :]


def rotated_dims(model: Model, kind: LayerKind) -> int:
    """Dimensions of a head that are rotated; the rest carry no position."""
    return round(model.head_dim * kind.rope_fraction)


def score_scale(model: Model, kind: LayerKind) -> float:
    """What the products of queries and keys are multiplied with."""
    return model.head_dim**-0.5 if kind.scale is None else kind.scale


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1, for all the devices that are left."""

    slice: int
    data: int
    fsdp: int
    context: int
    tensor: int

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            check(size == -1 or size >= 1, f"mesh.{axis}={size} must be at least 1, or -1 for the devices left over")
        rest = [axis for axis, size in sizes.items() if size == -1]
        check(len(rest) <= 1, f"mesh axes {' and '.join(rest)} are both -1; only one can take the devices left over")


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents of one kind: text files or a token store, or those of it that have a label and a length; or a task's rows."""

    paths: tuple[str, ...]
    store: str | None
    min_length: int
    label: str | None
    task: str | None
    pairs: int

    def __post_init__(self):
        check(not (self.paths and self.store), f"a source has paths={self.paths} or store={self.store!r}, not both")
        check(self.min_length >= 0, f"min_length={self.min_length} must not be negative")
        if self.task is None:
            return
        _one_of("task", self.task, tuple(TASKS))
        for name in ("paths", "store", "min_length", "label"):
            value = getattr(self, name)
            check(not value, f"a source has task={self.task!r} or documents, and {name}={value!r} is of documents")
        most = TASKS[self.task].pairs
        ok = most is None or 1 <= self.pairs <= most
        check(ok, f"pairs={self.pairs} must lie between 1 and {most} for task={self.task!r}")


@dataclasses.dataclass(frozen=True)
class Data:
    sources: Table[str, Source]
    tokenizer: str
    packing: str
    holdout: float
    seed: int
    prefetch: int

    def __post_init__(self):
        check(bool(self.sources), "data.sources is empty; a run needs at least one source")
        _one_of("data.packing", self.packing, ("concat", "best_fit"))
        check(self.seed >= 0, f"data.seed={self.seed} must not be negative")
        check(0 < self.holdout < 1, f"data.holdout={self.holdout} must lie between 0 and 1")
        check(self.prefetch >= 1, f"data.prefetch={self.prefetch} must be at least 1 batch")
        for name, source in self.sources.items():
            check(
                source.task is None or self.tokenizer == "bytes",
                f"data.sources.{name}: task={source.task!r} is written in bytes; use data.tokenizer='bytes', "
                f"not {self.tokenizer!r}",
            )


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    schedule: str
    warmup_steps: int
    decay_fraction: float
    final_lr_ratio: float
    z_loss: float

    def __post_init__(self):
        _one_of("optim.schedule", self.schedule, ("cosine", "wsd"))
        check(self.lr > 0, f"optim.lr={self.lr} must be positive")
        check(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} must not be negative")
        check(0 < self.decay_fraction <= 1, f"optim.decay_fraction={self.decay_fraction} must be in (0, 1]")
        check(self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} must be positive")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training at one sequence length, on one mixture of sources: the share of each in the tokens."""

    steps: int
    seq_len: int
    batch: int
    microbatches: int
    mixture: Table[str, float]

    def __post_init__(self):
        for name in ("steps", "seq_len", "batch", "microbatches"):
            check(getattr(self, name) >= 1, f"stages.{name}={getattr(self, name)} must be at least 1")
        for source, weight in self.mixture.items():
            check(0 <= weight < math.inf, f"stages.mixture.{source}={weight} must be a finite share, 0 or more")
        check(not self.mixture or any(self.mixture.values()), f"the weights of stages.mixture={self.mixture} sum to zero")


@dataclasses.dataclass(frozen=True)
class Train:
    dtype: str
    remat: str
    context: str
    balance: bool
    kernel: str
    loss_chunk: int
    mlp_chunk: int | None
    log_every: int
    checkpoint_every: int
    keep: int

    def __post_init__(self):
        _one_of("train.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("train.kernel", self.kernel, ("auto", "reference", "blocked", "splash", "tokamax", "cudnn"))
        for name in ("loss_chunk", "log_every", "checkpoint_every", "keep"):
            check(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        check(self.mlp_chunk is None or self.mlp_chunk >= 1, f"train.mlp_chunk={self.mlp_chunk} must be None or at least 1")


@dataclasses.dataclass(frozen=True)
class Evals:
    """What is measured of the model when training ends, and every so many steps before."""

    names: tuple[str, ...]
    every: int | None
    lengths: tuple[float, ...]
    tokens: int
    samples: int

    def __post_init__(self):
        for name in self.names:
            _one_of("evals.names", name, EVALS)
            check(self.names.count(name) == 1, f"evals.names={self.names} names {name!r} twice")
        check(self.every is None or self.every >= 1, f"evals.every={self.every} must be at least 1 step, or None")
        for name in ("tokens", "samples"):
            check(getattr(self, name) >= 1, f"evals.{name}={getattr(self, name)} must be at least 1")
        check(
            all(x > 0 for x in self.lengths),
            f"evals.lengths={self.lengths} must be positive multiples of the training length",
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What of a run's config its checkpoints are read with: what the model is, how it computes, and what it has read."""

    model: Model
    data: Data
    stages: tuple[Stage, ...]
    train: Train

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def weights(self, stage: int) -> dict[str, float]:
        """The weight of each source that takes part in a stage; an only source needs no mixture."""
        mixture = self.stages[stage].mixture or dict.fromkeys(self.data.sources, 1.0)
        return {name: weight for name, weight in mixture.items() if weight}

    @property
    def sources(self) -> list[str]:
        """The sources that take part in some stage."""
        return sorted({name for index in range(len(self.stages)) for name in self.weights(index)})

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that global step `step` belongs to, and the step within it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError(f"step {step + self.total_steps} lies beyond the last of {self.total_steps} steps")


@dataclasses.dataclass(frozen=True)
class Config(Trained):
    seed: int
    mesh: Mesh
    optim: Optim
    evals: Evals

    def __post_init__(self):
        check(bool(self.stages), "stages is empty; a run needs at least one stage")
        for index, stage in enumerate(self.stages):
            _check_mixture(f"stages[{index}].mixture", stage.mixture, sorted(self.data.sources))
            for name in self.weights(index):
                _check_task(f"stages[{index}].seq_len", stage.seq_len, name, self.data.sources[name], 2)
        for multiple in self.evals.lengths:
            for name in self.weights(-1):
                length = round(multiple * self.stages[-1].seq_len)
                _check_task(f"evals.lengths: {multiple} of the last seq_len,", length, name, self.data.sources[name], 1)
        remat(self.model, self.train)
        context(self.model, self.train)


def _check_mixture(field: str, mixture: Mapping[str, float], sources: Sequence[str]) -> None:
    known = ", ".join(sources)
    check(bool(mixture) or len(sources) == 1, f"{field} is empty and data.sources has {known}; give those wanted a weight")
    for name in mixture:
        near = difflib.get_close_matches(name, sources, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {known}"
        check(name in sources, f"{field} names {name!r}, which is not in data.sources; {hint}")


def shortest_row(source: Source) -> int:
    """The least tokens that a row of the source's task has."""
    form = TASKS[source.task]
    return form.tokens + form.tokens_a_pair * source.pairs


def _check_task(field: str, length: int, name: str, source: Source, parts: int) -> None:
    if source.task is not None:
        least, half = parts * shortest_row(source), "and rows from half of that on, " if parts == 2 else ""
        check(
            length >= least,
            f"{field} {length} is too short for data.sources.{name}: task={source.task!r} with pairs={source.pairs} "
            f"{half}needs {least} tokens; use that or more, or fewer pairs",
        )


def remat(model: Model, train: Train) -> Table[str, str]:
    """What the backward pass finds of each kind of layer, one of `REMAT` by letter."""
    return _by_letter("train.remat", train.remat, REMAT, model.pattern)


def context(model: Model, train: Train) -> Table[str, str]:
    """How each kind of layer attends to a sequence that devices share, by letter: one of `CONTEXT`, with "auto" resolved."""
    chosen = _by_letter("train.context", train.context, CONTEXT, model.pattern)
    bounded = {letter: model.kinds[letter].window or model.kinds[letter].chunk for letter in chosen}
    for letter, scheme in chosen.items():
        check(
            scheme != "halo" or bounded[letter],
            f"train.context: {letter}=halo needs a window or a chunk, and model.kinds.{letter} has none; "
            "use 'gather', 'ring' or 'exchange'",
        )
    return Table({k: x if x != "auto" else "halo" if bounded[k] else "gather" for k, x in chosen.items()})


def _by_letter(field: str, value: str, choices: Sequence[str], pattern: str) -> Table[str, str]:
    """The choice of each letter of `pattern`: "x" is for all of them, "L=x,G=y" for those named, the others have the first."""
    letters = sorted(set(pattern))
    if "=" not in value:
        _one_of(field, value, choices)
        return Table(dict.fromkeys(letters, value))
    named = {}
    for part in value.split(","):
        letter, _, choice = (x.strip() for x in part.partition("="))
        known = ", ".join(letters)
        check(letter in letters, f"{field}={value!r} names {letter!r}, and model.pattern={pattern!r} has {known}")
        check(letter not in named, f"{field}={value!r} names {letter!r} twice")
        _one_of(f"{field}: {letter}", choice, choices)
        named[letter] = choice
    return Table(dict.fromkeys(letters, choices[0]) | named)


def build(values: Mapping) -> Config:
    """A checked `Config` from the nested mapping of a config file; ValueError names the key that does not fit."""
    return trees.build(Config, values, "config")


def build_trained(values: Mapping) -> Trained:
    """Those groups of a config that made a checkpoint; of the others, other versions of this program have other keys."""
    read = {field.name for field in dataclasses.fields(Trained)}
    return trees.build(Trained, {key: x for key, x in values.items() if key in read}, "config")


def build_model(values: Mapping) -> Model:
    """A checked `Model` alone, as `build` makes it."""
    return trees.build(Model, values, "model")


def to_dict(config) -> dict:
    """The nested plain dict that `build` takes, fit for JSON."""
    return trees.plain(dataclasses.asdict(config))
