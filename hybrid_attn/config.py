"""The configuration: frozen dataclasses that validate themselves once, when they are built.

No field has a default here: `configs/base.py` of this package holds every default with its unit and its reason.
`build` turns the nested mapping of a config file into a `Config`; an error names the key that is wrong.
The parts are in `config_model.py`, `config_training.py` and `config_older.py`; this module has their names too.
"""
# ruff: noqa: F401 (the names of the parts)

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from hybrid_attn import trees
from hybrid_attn.config_model import (
    LONGEST,
    MLP,
    Adapter,
    LayerType,
    LowRank,
    Model,
    RopeScaling,
    Temperature,
    longest_text,
    mlp_width,
    output_scale,
    reach,
    rotated_dims,
    score_scale,
    shared_width,
    shortest_periods,
)
from hybrid_attn.config_older import RENAMED_CONTEXT, completed, upgraded
from hybrid_attn.config_training import (
    HOPS,
    QUERIES,
    TASKS,
    Data,
    Evals,
    Groups,
    InitFrom,
    LrSchedule,
    Mesh,
    Optim,
    Piece,
    Preference,
    Source,
    Stage,
    Train,
    check_min_length,
    check_rollback,
    shortest_sequence,
)
from hybrid_attn.configs import base
from hybrid_attn.trees import Partial, Table, check, check_fields, suggestion, within

REMAT = ("layer", "none", "attention", "offload")  # the first of each is the default of layer types that a config does not name
CONTEXT = ("auto", "halo", "gather", "ring", "ulysses")
# Keys that a stage may override; those of the model only if all arrays of the state but factors of low rank stay the same.
OF_STAGES = (
    "model.*", "mesh.*", "data.packing", "data.sources.*.min_length", "train.dtype", "train.remat", "train.overlap",
    "optim.b1", "optim.b2", "optim.eps", "optim.momentum", "optim.weight_decay", "optim.clip_norm", "optim.z_loss",
    "train.context", "train.zigzag", "train.kernel", "train.moe_kernel", "train.loss_chunk", "train.mlp_chunk", "train.unroll",
)  # fmt: skip
NO_ADAPTER: Adapter = trees.build(Adapter, base.adapter(), "adapter")
DENSE: LowRank = trees.build(LowRank, base.low_rank(), "low_rank")
OF_INITIAL_VALUES = (  # of all stages
    "model.init_std", "model.unembed_init_std", "model.depth_init", "model.mup_base_width", "model.mup_base_depth",
    "model.low_rank.init",
)  # fmt: skip


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    before, today = RENAMED_CONTEXT
    problem = f"is now called {today!r}" if value == before and today in choices else trees.not_among(value, choices)
    check(not problem, f"{field}={value!r} {problem}")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The config of one stage of a run, made by `Config.at`.

    `mixture` has the weight of each source and is never empty; `pieces` are those of the learning rate of the whole run;
    `override` is already put over the groups. Two of these are equal if their training steps compile to the same program for a
    batch of the same size.
    """

    index: int = dataclasses.field(compare=False)
    name: str = dataclasses.field(compare=False)
    steps: int = dataclasses.field(compare=False)
    tokens: int | None = dataclasses.field(compare=False)
    batch_ramp: tuple[int, ...] = dataclasses.field(compare=False)
    batch_ramp_tokens: int | None = dataclasses.field(compare=False)
    mixture: Table[str, float] = dataclasses.field(compare=False)
    model_changes: tuple[str, ...] = dataclasses.field(compare=False)
    lr_schedule: LrSchedule | None = dataclasses.field(compare=False)
    override: Partial[Groups] = dataclasses.field(compare=False)
    turn_patience: int | None = dataclasses.field(compare=False)
    turn_indicator: str | None = dataclasses.field(compare=False)
    data: Data = dataclasses.field(compare=False)
    trainable: tuple[str, ...]
    trainable_of_stages: tuple[tuple[str, ...], ...]
    seq_len: int
    batch: int
    microbatches: int
    objective: str
    average_over: str
    preference: Preference | None
    pieces: tuple[Piece, ...]
    model: Model
    mesh: Mesh
    optim: Optim
    train: Train

    def microbatches_of(self, batch: int) -> int:
        """How many microbatches a batch of this size has: those of the ramp are at most as large as those of `batch`."""
        return -(-batch * self.microbatches // self.batch)


GROUPS = tuple(field.name for field in dataclasses.fields(Groups))


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

    @property
    def stage_names(self) -> list[str]:
        """The name of each stage; one without a name has its number, from 1."""
        return [stage.name or str(number) for number, stage in enumerate(self.stages, 1)]

    def groups(self, stage: int) -> dict:
        """The groups of this config by name, with the override of a stage over them; ValueError where it does not fit."""
        index = range(len(self.stages))[stage]
        groups = {name: getattr(self, name) for name in GROUPS if hasattr(self, name)}
        return groups | {
            name: _overridden(group, self.stages[index].override[name], f"stages[{index}].override.{name}")
            for name, group in groups.items()
            if name in self.stages[index].override
        }

    def of_stage(self, stage: int) -> "CheckpointConfig":
        """This config with the groups of a stage in place of those of the run, and with no overrides."""
        stages = tuple(dataclasses.replace(x, override=Partial()) for x in self.stages)
        return dataclasses.replace(self, **self.groups(stage), stages=stages)

    def stage_steps(self, step: int) -> list[int]:
        """How many steps of each stage are done after the first `step` steps of the run."""
        done = []
        for stage in self.stages:
            done.append(min(step, stage.steps))
            step -= done[-1]
        return done

    def stage_at(self, step: int) -> tuple[int, int]:
        """The index of the stage of global step `step`, and the step within it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError(f"step {step + self.total_steps} is beyond the last of {self.total_steps} steps")

    def next_stage(self, step: int) -> int:
        """The index of the stage that goes on after `step` steps, or of the last stage at the end of the run."""
        return self.stage_at(min(step, self.total_steps - 1))[0]

    def last_stage(self, step: int) -> int:
        """The index of the stage of the last of the first `step` steps, or 0 before the first."""
        return self.next_stage(max(step - 1, 0))

    def batch_at(self, step: int) -> int:
        """The batch size of global step `step`."""
        index, step_of_stage = self.stage_at(step)
        return self.stages[index].batch_at(step_of_stage)

    def stage_tokens(self, step: int) -> list[int]:
        """Tokens of each stage in the first `step` steps of the run, padding included."""
        done = zip(self.stages, self.stage_steps(step), strict=True)
        return [stage.sequences(steps) * stage.seq_len for stage, steps in done]

    @property
    def trainable_of_stages(self) -> tuple[tuple[str, ...], ...]:
        """What each stage names as trained; empty where it trains the adapter, or else everything."""
        return tuple(stage.trainable for stage in self.stages)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of the learning rate: one for each stage, or one for all of them."""
        spans = [tuple((n, size * stage.seq_len) for n, size in stage.spans(stage.steps)) for stage in self.stages]
        if self.stages[0].lr_schedule is None:
            return (Piece(self.total_steps, None, sum(spans, ())),)
        return tuple(Piece(stage.steps, stage.lr_schedule, x) for stage, x in zip(self.stages, spans, strict=True))


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
        steps = self.total_steps
        check(steps < 2**31, f"the stages have {steps:,} steps together, and at most 2^31 - 1 can be counted")
        for index, stage in enumerate(self.stages):
            _check_override(f"stages[{index}].override", stage.override)
            _check_mixture(f"stages[{index}].mixture", stage.mixture, sorted(self.data.sources))
            _check_model_changes(f"stages[{index}].model_changes", stage.model_changes, self.model)
            alike = (stage.lr_schedule is None) == (self.stages[0].lr_schedule is None)
            check(alike, f"of stages[0] and stages[{index}] only one has lr_schedule; give every stage one, or none")
            for name in self.weights(index):
                check_min_length(index, name, self.at(index).data.sources[name], self.data.sources[name])
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
        for index, name in enumerate(self.stage_names):
            first = self.stage_names.index(name)
            check(first == index, f"stages[{first}] and stages[{index}] are both called {name!r}; give one another name")
        remat(self.model, self.train)
        context(self.model, self.train)
        for stage in self.each_stage:
            with _named(f"stages[{stage.index}].override"):
                remat(stage.model, stage.train)
                context(stage.model, stage.train)
        check_rollback(self.optim, self.train)
        _check_adapter(self)

    def at(self, stage: int) -> StageConfig:
        """The config of a stage by its index: the only place that puts the fields of a stage over those of the run."""
        return self.each_stage[stage]

    @functools.cached_property
    def each_stage(self) -> tuple[StageConfig, ...]:
        """The config of each stage, in order."""
        shared = {"pieces": self.pieces, "trainable_of_stages": self.trainable_of_stages}
        named = [{"name": name, "mixture": Table(self.weights(i))} for i, name in enumerate(self.stage_names)]
        return tuple(
            StageConfig(index=i, **shared, **vars(stage) | named[i], **self.groups(i)) for i, stage in enumerate(self.stages)
        )


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """A ValueError of the body gets the path of the key that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _overridden(group, changes: Mapping, path: str):
    """A group of a config with some of its keys changed; ValueError names the `path` of the changes."""
    values = trees.merged(to_dict(group), trees.plain(changes), f"{path}.")
    with _named(path):
        return trees.build(type(group), values, path.rpartition(".")[2])


def _check_override(path: str, override: Mapping) -> None:
    for key in trees.flat(override):
        ok = any(fnmatchcase(key, pattern) for pattern in OF_STAGES) and key not in OF_INITIAL_VALUES
        others = "" if key.startswith(("model", "mesh")) else f"; of {key.split('.')[0]} a stage may override "
        others += ", ".join(pattern for pattern in OF_STAGES if pattern.split(".")[0] == key.split(".")[0])
        check(ok, f"{path}.{key} is not possible: all stages share {key}{others}")


def _check_mixture(field: str, mixture: Mapping[str, float], sources: Sequence[str]) -> None:
    known = ", ".join(sources)
    check(bool(mixture) or len(sources) == 1, f"{field} is empty and data.sources has {known}; give sources a weight")
    for name in mixture:
        hint = suggestion(name, sources, otherwise=f"there are {known}")
        check(name in sources, f"{field} names {name!r}, which is not in data.sources; {hint}")


def _check_model_changes(field: str, keys: Sequence[str], model: Model) -> None:
    fields = trees.flat({"model": to_dict(model)})
    for key in keys:
        hint = suggestion(key, fields, otherwise="write a key such as 'model.kinds.L.rope_theta'")
        check(key in fields, f"{field} names {key!r}, which is no field of the model; {hint}")


def _check_adapter(c: Config) -> None:
    """ValueError for keys that do not go with an adapter, or with factors of low rank."""
    adapter, key, half_life = c.model.adapter.type, f"model.adapter.type={c.model.adapter.type!r}", c.optim.ema_half_life
    averages = f"optim.ema_half_life={half_life} averages all parameters, and with {key} most are fixed; leave it at None"
    check(adapter is None or half_life is None, averages)
    for chunk, fraction in ((x.train.mlp_chunk, x.model.low_rank.rank_fraction) for x in c.each_stage):
        both = f"train.mlp_chunk={chunk} and {key if fraction is None else f'model.low_rank.rank_fraction={fraction}'}"
        chunked = f"{both}: use only one, as a feed-forward that both concern takes all tokens at once"
        check(chunk is None or adapter is None and fraction is None, f"{chunked}; leave train.mlp_chunk at None")


def _check_task(field: str, length: int, name: str, source: Source, parts: int) -> None:
    if source.task is not None:
        parts = 1 if TASKS[source.task].text else parts
        least = parts * shortest_sequence(source.task, source.pairs)
        half = "and sequences from half of that on, " if parts == 2 else ""
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
        check(letter in letters, f"{field}={value!r} names {letter!r}, and the layers of the model are {', '.join(letters)}")
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


def with_override(values: Mapping, stage: int) -> dict:
    """The nested dict of a config, with the override of a stage put over its groups."""
    return trees.merged(values, values["stages"][stage]["override"])


def build_model(values: Mapping) -> Model:
    """A checked `Model`, as `build` makes it."""
    return trees.build(Model, values, "model")


def to_dict(config) -> dict:
    """The nested dict that `build` reads; it can be written as JSON."""
    return trees.plain(dataclasses.asdict(config))


def changes(c: Config) -> list[str]:
    """Lines for the fields of a config that differ from their defaults; each stage, layer type and source is compared."""
    values, defaults = to_dict(c), to_dict(build(base.get_config()))
    defaults["stages"] *= len(values["stages"])
    of_kind = {letter: trees.plain(base.kind()) for letter in values["model"]["kinds"]}
    defaults["model"]["kinds"] = of_kind | {x: kind for x, kind in defaults["model"]["kinds"].items() if x in of_kind}
    defaults["data"]["sources"] = {name: trees.plain(base.source()) for name in values["data"]["sources"]}
    return trees.differences(defaults, values)
