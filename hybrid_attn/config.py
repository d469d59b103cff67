"""The configuration: frozen dataclasses that validate themselves once, when they are built.

No field has a default here: `configs/base.py` of this package holds every default with its unit and its reason.
`build` turns the nested mapping of a config file into a `Config`; an error names the key that is wrong.
The parts are in `config_model.py` and `config_training.py`; this module has their names too.
"""
# ruff: noqa: F401 (the names of the parts)

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

from hybrid_attn import trees
from hybrid_attn.config_model import (
    LONGEST,
    LayerType,
    Model,
    RopeScaling,
    Temperature,
    output_scale,
    reach,
    rotated_dims,
    score_scale,
    shortest_periods,
)
from hybrid_attn.config_training import (
    HOPS,
    QUERIES,
    TASKS,
    Data,
    Evals,
    InitFrom,
    LrSchedule,
    Mesh,
    Optim,
    Piece,
    Source,
    Stage,
    Train,
    shortest_sequence,
)
from hybrid_attn.configs import base
from hybrid_attn.trees import Table, check, check_fields, suggestion, within

REMAT = ("layer", "none", "attention", "offload")  # the first of each is the default of layer types that a config does not name
CONTEXT = ("auto", "halo", "gather", "ring", "ulysses")
# Keys of `model` and `optim` that older configs lack.
NEW_MODEL = "prefix", "mup_base_width", "mup_base_depth", "depth_init"
NEW_OPTIM = (
    "optimiser", "momentum", "moment_dtype", "independent_decay", "decay_shape",
    "ema_half_life", "spike_factor", "max_consecutive_spikes",
)  # fmt: skip
RENAMED_CONTEXT = "exchange", "ulysses"  # its name in older configs and checkpoints, and today's


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    before, today = RENAMED_CONTEXT
    problem = f"is now called {today!r}" if value == before and today in choices else trees.not_among(value, choices)
    check(not problem, f"{field}={value!r} {problem}")


def longest_text(config_json: Mapping, path: os.PathLike) -> int | None:
    """max_position_embeddings of the config.json of a published model, or None; ValueError if it is no number of tokens."""
    length = config_json.get("max_position_embeddings")
    check(
        length is None or (type(length) is int and 2 <= length < 2**31),
        f"{path} has max_position_embeddings={length!r}; make it a number of tokens, from 2 to {2**31 - 1:,}, or take it out",
    )
    return length


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The config of one stage of a run, made by `Config.at`.

    `mixture` has the weight of each source and is never empty; `pieces` are those of the learning rate of the whole run.
    Configs of two stages are equal if their training steps compile to the same program.
    """

    index: int = dataclasses.field(compare=False)
    steps: int = dataclasses.field(compare=False)
    mixture: Table[str, float] = dataclasses.field(compare=False)
    model_changes: tuple[str, ...] = dataclasses.field(compare=False)
    lr_schedule: LrSchedule | None = dataclasses.field(compare=False)
    seq_len: int
    batch: int
    microbatches: int
    objective: str
    pieces: tuple[Piece, ...]
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
            _check_mixture(f"stages[{index}].mixture", stage.mixture, sorted(self.data.sources))
            _check_model_changes(f"stages[{index}].model_changes", stage.model_changes, self.model)
            alike = (stage.lr_schedule is None) == (self.stages[0].lr_schedule is None)
            check(alike, f"of stages[0] and stages[{index}] only one has lr_schedule; give every stage one, or none")
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
        return StageConfig(index=index, pieces=self.pieces, **fields, **groups)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of the learning rate: one for each stage, or one for all of them."""
        if self.stages[0].lr_schedule is None:
            return (Piece(self.total_steps, None),)
        return tuple(Piece(stage.steps, stage.lr_schedule) for stage in self.stages)

    @property
    def each_stage(self) -> tuple[StageConfig, ...]:
        """The config of each stage, in order."""
        return tuple(self.at(index) for index in range(len(self.stages)))


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


def _check_task(field: str, length: int, name: str, source: Source, parts: int) -> None:
    if source.task is not None:
        least, half = parts * shortest_sequence(source), "and sequences from half of that on, " if parts == 2 else ""
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
    """The nested dict of a config; keys that older ones lack get their defaults, the only choice when those were written."""
    values, defaults = trees.plain(values), trees.plain(base.get_config())
    model, stages = values.get("model"), values.get("stages")
    kinds = model.get("kinds") if isinstance(model, dict) else None
    _add([values], defaults, "init_from")
    _add([model], defaults["model"], *NEW_MODEL)
    _add([values.get("optim")], defaults["optim"], *NEW_OPTIM)
    _add(stages if isinstance(stages, list) else (), defaults["stages"][0], "objective", "model_changes", "lr_schedule")
    _add(kinds.values() if isinstance(kinds, dict) else (), base.kind(), "mixer", "mlp")
    return values


def _add(groups: Iterable, defaults: Mapping, *keys: str) -> None:
    """Adds those of the `keys` that a group lacks. `build` refuses what is no group."""
    for group in groups:
        if isinstance(group, dict):
            group |= {key: defaults[key] for key in keys if key not in group}


def upgraded(values: Mapping) -> dict:
    """The nested dict of a checkpoint's config with today's keys: `completed`, and with new names for old ones."""
    values = completed(values)
    train = values.get("train")
    if isinstance(train, dict) and "balance" in train:
        train["zigzag"] = train.pop("balance")
        train["context"] = train["context"].replace(*RENAMED_CONTEXT)
    return values


def build_model(values: Mapping) -> Model:
    """A checked `Model`, as `build` makes it."""
    return trees.build(Model, values, "model")


def to_dict(config) -> dict:
    """The nested dict that `build` reads; it can be written as JSON."""
    return trees.plain(dataclasses.asdict(config))
