"""The configuration: frozen dataclasses that validate themselves once, when they are built.

No field has a default here: `configs/base.py` of this package holds every default with its unit and its reason.
`build` turns the nested mapping of a config file into a `Config`; an error names the key that is wrong.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrid_attn import trees
from hybrid_attn.trees import Table, check, check_fields, named, one_of, within

REMAT = ("layer", "none", "attention", "offload")  # the first of each is the default of layer types that a config does not name
CONTEXT = ("auto", "halo", "gather", "ring", "ulysses")
RENAMED_CONTEXT = "exchange", "ulysses"  # its name in older configs and checkpoints, and today's
LONGEST = 2**27  # tokens of a sequence: 134 million
MOST_STEPS = 10**9
MOST_LAYERS = 10_000
QUERIES = 6  # in a sequence of the task "recall", of three tokens each
HOPS = 3  # of a chain of the task "tracking", whose variables are one more; an assignment is three tokens


class TaskForm(NamedTuple):
    """The sequences of a task: the most pairs (None: no pairs), and their fewest tokens without pairs and per pair."""

    pairs: int | None
    tokens: int
    tokens_a_pair: int


TASKS = {
    "recall": TaskForm(8, 3 * QUERIES, 2),
    "mqar": TaskForm(127, 1, 4),
    "copy": TaskForm(None, 3, 0),
    "tracking": TaskForm(4, HOPS + 3, 3 * (HOPS + 1)),
}


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    before, today = RENAMED_CONTEXT
    problem = f"is now called {today!r}" if value == before and today in choices else trees.not_among(value, choices)
    check(not problem, f"{field}={value!r} {problem}")


def longest_text(config_json: Mapping, path: os.PathLike) -> int | None:
    """max_position_embeddings of a published model's config.json, which is at `path`; None where it has none.

    ValueError where it is no number of tokens.
    """
    length = config_json.get("max_position_embeddings")
    check(
        length is None or (type(length) is int and 2 <= length < 2**31),
        f"{path} has max_position_embeddings={length!r}; make it a number of tokens, from 2 to {2**31 - 1:,}, or take it out",
    )
    return length


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies beyond the length that they were trained at."""

    type: str = one_of("none", "linear", "ntk", "yarn", "llama3")
    factor: float = within(1, 10**6)
    original_len: int = within(1, LONGEST, aliases=("original_max_position_embeddings",))
    low: float = within(0, 10**6, above=True, aliases=("beta_slow", "low_freq_factor"))
    high: float = within(0, 10**6, above=True, aliases=("beta_fast", "high_freq_factor"))
    attention_factor: float | None = within(0, 10**6, above=True)

    def __post_init__(self):
        check_fields(self, "rope_scaling")
        check(
            self.type not in ("yarn", "llama3") or self.low < self.high,
            f"rope_scaling.low={self.low} must be below rope_scaling.high={self.high}",
        )


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Growth of the attention scale with the position of the query."""

    type: str = one_of("none", "log_length", "steps", "learned")
    scale: float = within(0, 10**6)
    length: int = within(2, LONGEST)

    def __post_init__(self):
        check_fields(self, "temperature")


@dataclasses.dataclass(frozen=True)
class LayerType:
    """What one letter of the pattern means: its mixer and feed-forward, which keys a query sees, how positions enter."""

    mixer: str
    mlp: str
    window: int | None = within(1, 2**31 - 1, aliases=("sliding_window",))
    chunk: int | None = within(1, 2**31 - 1, aliases=("attention_chunk_size",))
    rope_theta: float | None = within(1, 10**18, above=True, aliases=("theta", "rope_base"))
    rope_fraction: float = within(0, 1, above=True, aliases=("partial_rotary_factor", "rotary_pct"))
    rope_scaling: RopeScaling
    qk_norm: str = one_of("none", "layernorm", "rms", "rms_plus1", "rms_weightless")
    qk_norm_scope: str = one_of("head_dim", "head", "projection")
    qk_norm_after_rope: bool
    scale: float | None = within(0, 10**6, above=True)
    softcap: float | None = within(0, 10**6, above=True, aliases=("attn_logit_softcapping",))
    temperature: Temperature
    sink: bool
    gate: str = one_of("none", "head", "projection")

    def __post_init__(self):
        check_fields(self, "kind")
        check(self.window is None or self.chunk is None, "a layer type has a window or a chunk, not both")
        check(
            self.rope_theta is not None or self.rope_scaling.type == "none",
            f"rope_scaling.type={self.rope_scaling.type!r} scales nothing without a rope_theta",
        )
        check(
            not self.qk_norm_after_rope or (self.qk_norm != "none" and self.rope_theta is not None),
            "qk_norm_after_rope needs a qk_norm and a rope_theta",
        )


@dataclasses.dataclass(frozen=True)
class Model:
    vocab_size: int = within(1, 2**24)
    prefix: str
    pattern: str
    num_layers: int = within(1, MOST_LAYERS, aliases=("num_hidden_layers", "n_layer", "depth"))
    d_model: int = within(1, 2**20, aliases=("hidden_size", "hidden_dim", "width", "n_embd"))
    num_heads: int = within(1, 2**16, aliases=("num_attention_heads", "n_head"))
    num_kv_heads: int = within(1, 2**16, aliases=("num_key_value_heads",))
    head_dim: int = within(1, 2**16)
    d_ff: int = within(1, 2**24, aliases=("intermediate_size", "ffn_dim", "mlp_dim"))
    block: str = one_of("parallel", "pre", "post", "sandwich")
    norm: str = one_of("layernorm", "rms", "rms_plus1")
    norm_eps: float = within(0, 1, above=True, aliases=("rms_norm_eps", "layer_norm_eps"))
    activation: str = one_of("silu", "gelu", "gelu_tanh")
    rope_layout: str = one_of("interleaved", "half")
    tie_embeddings: bool = trees.named("tie_word_embeddings", "use_embedding_sharing")
    embed_scale: float = within(0, 10**6, above=True)
    logit_scale: float = within(0, 10**6, above=True)
    logit_softcap: float | None = within(0, 10**6, above=True, aliases=("final_logit_softcapping",))
    init_std: float = within(0, 100, above=True, aliases=("initializer_range",))
    kinds: Table[str, LayerType]

    def __post_init__(self):
        check_fields(self, "model")
        for letter in self.kinds:
            ok = len(letter) == 1 and letter.isascii() and letter.isalpha()
            check(ok, f"model.kinds names a layer type {letter!r}; a name is one letter from A to Z or a to z")
        check(bool(self.pattern), "model.pattern is empty; write one letter for each layer of a period, as in 'LLLG'")
        check(len(self.pattern) <= MOST_LAYERS, f"model.pattern has {len(self.pattern):,} letters, and at most {MOST_LAYERS:,}")
        check(
            len(self.prefix) <= self.num_layers,
            f"model.prefix={self.prefix!r} has more layers than model.num_layers={self.num_layers:,}; use more layers",
        )
        for field, letters in (("prefix", self.prefix), ("pattern", self.pattern)):
            for letter in sorted(set(letters)):
                known = ", ".join(sorted(self.kinds))
                check(letter in self.kinds, f"model.{field}={letters!r} uses {letter!r}; model.kinds defines {known}")
                self._check_rotation(letter)
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
            f"use {self.num_heads // self.num_kv_heads * self.num_kv_heads or self.num_kv_heads} heads",
        )

    def _check_rotation(self, letter: str) -> None:
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

    @property
    def layers(self) -> str:
        """The letter of each layer, in order: the prefix, then the pattern again and again."""
        return (self.prefix + self.pattern * -(-self.num_layers // len(self.pattern)))[: self.num_layers]

    @property
    def num_periods(self) -> int:
        """Complete repetitions of the pattern after the prefix; the remaining layers are the tail."""
        return (self.num_layers - len(self.prefix)) // len(self.pattern)

    @property
    def tail(self) -> str:
        return self.layers[len(self.prefix) + self.num_periods * len(self.pattern) :]

    @property
    def groups(self) -> list[tuple[str, str, int]]:
        """Name in the parameters, letters and repetitions of the layers before, in and after the periods, if there are any."""
        groups = ("prefix", self.prefix, 1), ("periods", self.pattern, self.num_periods), ("tail", self.tail, 1)
        return [group for group in groups if group[1] and group[2]]


def reach(kind: LayerType) -> str | None:
    """The mask of a layer type as text; None for the whole prefix."""
    if kind.window is not None:
        return f"window {kind.window:,}"
    return None if kind.chunk is None else f"chunks of {kind.chunk:,}"


def rotated_dims(model: Model, kind: LayerType) -> int:
    """Dimensions of a head that are rotated; the others carry no position."""
    return round(model.head_dim * kind.rope_fraction)


def score_scale(model: Model, kind: LayerType) -> float:
    """The factor on the products of queries and keys."""
    return model.head_dim**-0.5 if kind.scale is None else kind.scale


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1, for all remaining devices."""

    slice: int = within(1, 2**20, also=-1)
    data: int = within(1, 2**20, also=-1, aliases=("data_parallel", "dp"))
    fsdp: int = within(1, 2**20, also=-1)
    context: int = within(1, 2**20, also=-1, aliases=("context_parallel", "cp"))
    tensor: int = within(1, 2**20, also=-1, aliases=("tensor_parallel", "tp"))

    def __post_init__(self):
        check_fields(self, "mesh")
        unset = [axis for axis, size in dataclasses.asdict(self).items() if size == -1]
        check(len(unset) <= 1, f"mesh axes {' and '.join(unset)} are both -1; only one can take the devices left over")


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents from text files or from a token store, filtered by label and length; or the sequences of a synthetic task."""

    paths: tuple[str, ...]
    store: str | None
    min_length: int = within(0, 2**40)
    label: str | None
    task: str | None = one_of(*TASKS)
    pairs: int = within(0, 1000)

    def __post_init__(self):
        check_fields(self, "source")
        check(not (self.paths and self.store), f"a source has paths={self.paths} or store={self.store!r}, not both")
        check(self.store != "", "store='' names no token store; use None for text files")
        if self.task is None:
            return
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
    packing: str = one_of("concat", "best_fit")
    holdout: float = within(0, 1, above=True, below=True)
    seed: int = within(0, 2**32 - 1)
    prefetch: int = within(1, 256)

    def __post_init__(self):
        check_fields(self, "data")
        check(bool(self.sources), "data.sources is empty; a run needs at least one source")
        for name, source in self.sources.items():
            check(
                source.task is None or self.tokenizer == "bytes",
                f"data.sources.{name}: task={source.task!r} is written in bytes; use data.tokenizer='bytes', "
                f"not {self.tokenizer!r}",
            )


@dataclasses.dataclass(frozen=True)
class Optim:
    optimiser: str = named("optimizer")
    lr: float = within(0, 100, above=True, aliases=("learning_rate", "peak_lr", "max_lr"))
    b1: float = within(0, 1, below=True, aliases=("adam_beta1",))
    b2: float = within(0, 1, below=True, aliases=("adam_beta2",))
    eps: float = within(0, 1, above=True)
    weight_decay: float = within(0, 100)
    clip_norm: float = within(0, 10**12, above=True, aliases=("grad_clip", "max_grad_norm", "gradient_clipping"))
    schedule: str = one_of("cosine", "wsd")
    warmup_steps: int = within(0, MOST_STEPS)
    decay_fraction: float = within(0, 1, above=True)
    final_lr_ratio: float = within(0, 1, aliases=("min_lr_ratio",))
    z_loss: float = within(0, 1)

    def __post_init__(self):
        check_fields(self, "optim")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with a sequence length, a batch and a mixture, which gives each source's share of the tokens."""

    steps: int = within(1, MOST_STEPS, aliases=("num_steps", "max_steps", "train_steps"))
    seq_len: int = within(1, LONGEST, aliases=("sequence_length", "context_length", "max_seq_len", "block_size"))
    batch: int = within(1, 2**24, aliases=("batch_size", "global_batch_size"))
    microbatches: int = within(1, 2**24, aliases=("gradient_accumulation_steps", "grad_accum", "accumulation"))
    mixture: Table[str, float] = within(0, 10**9)
    objective: str = named("loss")
    model_changes: tuple[str, ...]

    def __post_init__(self):
        check_fields(self, "stages")
        tokens = self.batch * self.seq_len
        check(
            tokens < 2**31,
            f"batch={self.batch} times seq_len={self.seq_len} is {tokens:,} tokens a step; below 2^31 can be counted",
        )
        check(not self.mixture or any(self.mixture.values()), f"the weights of stages.mixture={self.mixture} sum to zero")


@dataclasses.dataclass(frozen=True)
class Train:
    dtype: str = one_of("auto", "float32", "bfloat16")
    remat: str
    context: str
    zigzag: bool = named("balance")
    kernel: str = one_of("auto", "reference", "blocked", "splash", "tokamax", "cudnn")
    loss_chunk: int = within(1, 2**31 - 1)
    mlp_chunk: int | None = within(1, 2**31 - 1)
    log_every: int = within(1, MOST_STEPS, aliases=("log_interval", "logging_steps"))
    checkpoint_every: int = within(1, MOST_STEPS, aliases=("save_every", "save_interval", "save_steps"))
    keep: int = within(1, MOST_STEPS, aliases=("save_total_limit",))

    def __post_init__(self):
        check_fields(self, "train")


@dataclasses.dataclass(frozen=True)
class Evals:
    """The evaluations at the end of training, and every `every` steps."""

    names: tuple[str, ...]  # checked by the trainer, which knows the evaluations
    every: int | None = within(1, MOST_STEPS, aliases=("eval_every", "eval_interval", "eval_steps"))
    lengths: tuple[float, ...] = within(0, LONGEST, above=True)
    tokens: int = within(1, 10**12)
    samples: int = within(1, 10_000)

    def __post_init__(self):
        check_fields(self, "evals")
        for name in self.names:
            check(self.names.count(name) == 1, f"evals.names={self.names} names {name!r} twice")


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """The checkpoint whose parameters a run starts from, and the parameters that the two do not share."""

    path: str | None
    step: int | None = within(0, 2**31 - 1)
    new: tuple[str, ...]
    ignore: tuple[str, ...]
    rename: tuple[str, ...]

    def __post_init__(self):
        check_fields(self, "init_from")
        check(self.path is None or bool(self.path.strip()), "init_from.path='' names no checkpoint; use None for none")
        for name in ("step", "new", "ignore", "rename"):
            value = getattr(self, name)
            check(self.path is not None or value in (None, ()), f"init_from.{name}={value!r} needs an init_from.path")
        for entry, names in zip(self.rename, self.renamed, strict=True):
            check(len(names) == 2 and all(names), f"init_from.rename has {entry!r}; write 'OLD NAME -> NEW NAME'")

    @property
    def renamed(self) -> list[tuple[str, ...]]:
        """The name in the checkpoint and the name in this model of every entry of `rename`."""
        return [tuple(name.strip() for name in entry.split("->")) for entry in self.rename]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The config of one stage of a run, made by `Config.at`.

    `mixture` has the weight of each source and is never empty; `total_steps` are those of all stages, which the learning-rate
    schedule spans. Configs of two stages are equal if their training steps compile to the same program.
    """

    index: int = dataclasses.field(compare=False)
    steps: int = dataclasses.field(compare=False)
    mixture: Table[str, float] = dataclasses.field(compare=False)
    model_changes: tuple[str, ...] = dataclasses.field(compare=False)
    seq_len: int
    batch: int
    microbatches: int
    objective: str
    total_steps: int
    model: Model
    mesh: Mesh
    optim: Optim
    train: Train


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The groups of a run's config that a reader of its checkpoints needs."""

    model: Model
    data: Data
    stages: tuple[Stage, ...]
    train: Train

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def weights(self, stage: int) -> dict[str, float]:
        """The weight of each source of a stage; a single source needs no mixture."""
        mixture = self.stages[stage].mixture or dict.fromkeys(self.data.sources, 1.0)
        return {name: weight for name, weight in mixture.items() if weight}

    @property
    def sources(self) -> list[str]:
        """The sources of all stages."""
        return sorted({name for index in range(len(self.stages)) for name in self.weights(index)})

    def stage_at(self, step: int) -> tuple[int, int]:
        """The index of the stage of global step `step`, and the step within it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError(f"step {step + self.total_steps} is beyond the last of {self.total_steps} steps")


@dataclasses.dataclass(frozen=True)
class Config(CheckpointConfig):
    seed: int = within(0, 2**32 - 1)
    mesh: Mesh
    optim: Optim
    evals: Evals
    init_from: InitFrom

    def __post_init__(self):
        check_fields(self, "config")
        check(bool(self.stages), "stages is empty; a run needs at least one stage")
        check(
            self.total_steps < 2**31,
            f"the stages have {self.total_steps:,} steps together, and at most 2^31 - 1 can be counted",
        )
        for index, stage in enumerate(self.stages):
            _check_mixture(f"stages[{index}].mixture", stage.mixture, sorted(self.data.sources))
            _check_model_changes(f"stages[{index}].model_changes", stage.model_changes, self.model)
            for name in self.weights(index):
                _check_task(f"stages[{index}].seq_len", stage.seq_len, name, self.data.sources[name], 2)
        for multiple in self.evals.lengths:
            length = round(multiple * self.stages[-1].seq_len)
            check(
                2 <= length <= LONGEST,
                f"evals.lengths: {multiple} of the last seq_len, {self.stages[-1].seq_len:,}, is {length:,} tokens; "
                f"from 2 to {LONGEST:,} can be measured",
            )
            for name in self.weights(-1):
                _check_task(f"evals.lengths: {multiple} of the last seq_len,", length, name, self.data.sources[name], 1)
        remat(self.model, self.train)
        context(self.model, self.train)

    def at(self, stage: int) -> StageConfig:
        """The config of a stage by its index: the only place that puts the fields of a stage over those of the run."""
        index = range(len(self.stages))[stage]
        fields = vars(self.stages[index]) | {"mixture": Table(self.weights(index))}
        groups = {name: getattr(self, name) for name in ("model", "mesh", "optim", "train")}
        return StageConfig(index=index, total_steps=self.total_steps, **fields, **groups)

    @property
    def each_stage(self) -> tuple[StageConfig, ...]:
        """The config of each stage, in order."""
        return tuple(self.at(index) for index in range(len(self.stages)))


def _check_mixture(field: str, mixture: Mapping[str, float], sources: Sequence[str]) -> None:
    known = ", ".join(sources)
    check(bool(mixture) or len(sources) == 1, f"{field} is empty and data.sources has {known}; give sources a weight")
    for name in mixture:
        near = difflib.get_close_matches(name, sources, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {known}"
        check(name in sources, f"{field} names {name!r}, which is not in data.sources; {hint}")


def _check_model_changes(field: str, keys: Sequence[str], model: Model) -> None:
    fields = trees.flat({"model": to_dict(model)})
    for key in keys:
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else "write a key such as 'model.kinds.L.rope_theta'"
        check(key in fields, f"{field} names {key!r}, which is no field of the model; {hint}")


def shortest_row(source: Source) -> int:
    """The fewest tokens of a sequence of the source's task."""
    form = TASKS[source.task]
    return form.tokens + form.tokens_a_pair * source.pairs


def _check_task(field: str, length: int, name: str, source: Source, parts: int) -> None:
    if source.task is not None:
        least, half = parts * shortest_row(source), "and sequences from half of that on, " if parts == 2 else ""
        check(
            length >= least,
            f"{field} {length} is too short for data.sources.{name}: task={source.task!r} with pairs={source.pairs} "
            f"{half}needs {least} tokens; use that or more, or fewer pairs",
        )


def remat(model: Model, train: Train) -> Table[str, str]:
    """The residuals of each layer type, one of `REMAT` by letter."""
    return _by_letter("train.remat", train.remat, REMAT, model.prefix + model.pattern)


def context(model: Model, train: Train) -> Table[str, str]:
    """The context-parallel scheme of each layer type by letter: one of `CONTEXT`, with "auto" resolved."""
    chosen = _by_letter("train.context", train.context, CONTEXT, model.prefix + model.pattern)
    bounded = {letter: model.kinds[letter].window or model.kinds[letter].chunk for letter in chosen}
    for letter, scheme in chosen.items():
        check(
            scheme != "halo" or bounded[letter],
            f"train.context: {letter}=halo needs a window or a chunk, and model.kinds.{letter} has none; "
            "use 'gather', 'ring' or 'ulysses'",
        )
    return Table({k: x if x != "auto" else "halo" if bounded[k] else "gather" for k, x in chosen.items()})


def _by_letter(field: str, value: str, choices: Sequence[str], letters: str) -> Table[str, str]:
    """The choice of each of `letters`: "x" for all of them, "L=x,G=y" for these; the default is the first choice."""
    letters = sorted(set(letters))
    if "=" not in value:
        _check_choice(field, value, choices)
        return Table(dict.fromkeys(letters, value))
    named = {}
    for part in value.split(","):
        letter, _, choice = (x.strip() for x in part.partition("="))
        known = ", ".join(letters)
        check(letter in letters, f"{field}={value!r} names {letter!r}, and the layers of the model are {known}")
        check(letter not in named, f"{field}={value!r} names {letter!r} twice")
        _check_choice(f"{field}: {letter}", choice, choices)
        named[letter] = choice
    return Table(dict.fromkeys(letters, choices[0]) | named)


def build(values: Mapping) -> Config:
    """A checked `Config` from the nested mapping of a config file; ValueError names the key that does not fit."""
    return trees.build(Config, completed(values), "config")


def build_checkpoint_config(values: Mapping) -> CheckpointConfig:
    """The `CheckpointConfig` of a checkpoint's config; other versions of this program have other keys in other groups."""
    groups = {field.name for field in dataclasses.fields(CheckpointConfig)}
    return trees.build(CheckpointConfig, {key: x for key, x in values.items() if key in groups}, "config")


def completed(values: Mapping) -> dict:
    """The nested dict of a config with the keys that it lacks because there was one choice when it was written."""
    values = trees.plain(values)
    kinds, stages, optim = (values.get("model", {}).get("kinds"), values.get("stages"), values.get("optim"))
    for layer_type in kinds.values() if isinstance(kinds, dict) else ():
        if isinstance(layer_type, dict):
            layer_type |= {"mixer": "attention", "mlp": "gated"} | layer_type
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict):
            stage |= {"objective": "next_token", "model_changes": []} | stage
    if isinstance(values.get("model"), dict):
        values["model"] = {"prefix": ""} | values["model"]
    if isinstance(optim, dict):
        optim |= {"optimiser": "adamw"} | optim
    return {"init_from": {"path": None, "step": None, "new": [], "ignore": [], "rename": []}} | values


def upgraded(values: Mapping) -> dict:
    """The nested dict of a checkpoint's config with today's keys: `completed`, and with new names for old ones."""
    values = completed(values)
    train = values.get("train", {})
    if "balance" in train:
        train["zigzag"] = train.pop("balance")
        train["context"] = train["context"].replace(*RENAMED_CONTEXT)
    return values


def build_model(values: Mapping) -> Model:
    """A checked `Model`, as `build` makes it."""
    return trees.build(Model, values, "model")


def to_dict(config) -> dict:
    """The nested dict that `build` reads; it can be written as JSON."""
    return trees.plain(dataclasses.asdict(config))
