"""The parts of a config that describe a run: mesh, data, optimiser, stages, evaluations. Others import them from `config`."""

import dataclasses
import math
import re
from typing import NamedTuple

from hybrid_attn.config_model import LONGEST, Model
from hybrid_attn.trees import Partial, Table, check, check_fields, check_once, named, one_of, within

MOST_STEPS = 10**9
MOST_TOKENS = 2**60
MOST_RAMP = 8  # sizes of a batch ramp; each is a program that is compiled
NAME = r"[^\W_][\w.+-]{0,39}"  # of a stage
QUERIES = 6  # in a sequence of the task "recall", of three tokens each
HOPS = 3  # of a chain of the task "tracking", whose variables are one more; an assignment is three tokens


class TaskForm(NamedTuple):
    """The sequences of a task: the most pairs (None: no pairs), and their fewest tokens without pairs and per pair.

    A task with a `text` hides its pairs in the documents of its source.
    """

    pairs: int | None
    tokens: int
    tokens_a_pair: int
    text: bool = False


TASKS = {
    "recall": TaskForm(8, 3 * QUERIES, 2),
    "mqar": TaskForm(127, 1, 4),
    "copy": TaskForm(None, 3, 0),
    "tracking": TaskForm(4, HOPS + 3, 3 * (HOPS + 1)),
    "needle": TaskForm(16, 200, 374, text=True),
}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1, for all remaining devices."""

    slice: int = within(1, 2**20, also=-1)
    data: int = within(1, 2**20, also=-1, aliases=("data_parallel", "dp"))
    fsdp: int = within(1, 2**20, also=-1)
    expert: int = within(1, 2**20, also=-1, aliases=("expert_parallel", "ep"))
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
        for name in () if TASKS[self.task].text else ("paths", "store", "min_length", "label"):
            value = getattr(self, name)
            check(not value, f"a source has task={self.task!r} or documents, and {name}={value!r} is of documents")
        most = TASKS[self.task].pairs
        ok = most is None or 1 <= self.pairs <= most
        check(ok, f"pairs={self.pairs} must lie between 1 and {most} for task={self.task!r}")


def shortest_sequence(task: str, pairs: int) -> int:
    """The fewest tokens of a sequence of a task with so many pairs."""
    form = TASKS[task]
    return form.tokens + form.tokens_a_pair * pairs


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


FALLING = ("cosine", "wsd", "linear")  # shapes with a last rate of their own
SHAPES = (*FALLING, "constant", "inverse_sqrt")
DECAY_SHAPES = ("linear", "sqrt", "exponential")


@dataclasses.dataclass(frozen=True)
class LrSchedule:
    """The learning rate of one stage: a warm-up to `start`, then a shape, which falls to `end` if it is one of `FALLING`."""

    shape: str = one_of(*SHAPES)
    start: float | None = within(0, 100, above=True)
    end: float | None = within(0, 100)
    warmup_steps: int = within(0, MOST_STEPS)
    warmup_tokens: int | None = within(0, MOST_TOKENS)
    decay_fraction: float = within(0, 1, above=True)
    decay_shape: str = one_of(*DECAY_SHAPES)
    jump: bool

    def __post_init__(self):
        check_fields(self, "lr_schedule")
        falls = self.shape in FALLING
        needs = "needs a last rate" if falls else "has no last rate of its own"
        check(falls == (self.end is not None), f"lr_schedule.shape={self.shape!r} {needs}, and lr_schedule.end={self.end}")
        zero = self.shape == "wsd" and self.decay_shape == "exponential" and self.end == 0
        check(not zero, "lr_schedule.end=0 is never reached by an exponential decay; use a small rate")
        _check_warmup("lr_schedule", self.warmup_steps, self.warmup_tokens)


def _check_warmup(group: str, steps: int, tokens: int | None) -> None:
    both = f"{group}.warmup_steps={steps} and {group}.warmup_tokens={tokens} are both set"
    cure = "a schedule counts steps or tokens; use warmup_steps=0 or warmup_tokens=None"
    check(not steps or tokens is None, f"{both}, and {cure}")


@dataclasses.dataclass(frozen=True)
class Optim:
    optimiser: str = named("optimizer")
    lr: float = within(0, 100, above=True, aliases=("learning_rate", "peak_lr", "max_lr"))
    b1: float = within(0, 1, below=True, aliases=("adam_beta1",))
    b2: float = within(0, 1, below=True, aliases=("adam_beta2",))
    eps: float = within(0, 1, above=True)
    momentum: float = within(0, 1, below=True)
    moment_dtype: str = one_of("float32", "bfloat16")
    weight_decay: float = within(0, 100)
    low_rank_decay: str = one_of("frobenius", "l2")
    independent_decay: bool
    clip_norm: float = within(0, 10**12, above=True, aliases=("grad_clip", "max_grad_norm", "gradient_clipping"))
    schedule: str = one_of(*SHAPES)
    warmup_steps: int = within(0, MOST_STEPS)
    warmup_tokens: int | None = within(0, MOST_TOKENS)
    decay_fraction: float = within(0, 1, above=True)
    decay_shape: str = one_of(*DECAY_SHAPES)
    final_lr_ratio: float = within(0, 1, aliases=("min_lr_ratio",))
    z_loss: float = within(0, 1)
    ema_half_life: float | None = within(0, 1, above=True)
    spike_factor: float | None = within(1, 10**6, above=True)
    max_consecutive_spikes: int = within(1, 10_000)
    rollback_steps: int | None = within(1, MOST_STEPS)

    def __post_init__(self):
        check_fields(self, "optim")
        zero = self.schedule == "wsd" and self.decay_shape == "exponential" and self.final_lr_ratio == 0
        check(not zero, "optim.final_lr_ratio=0 is never reached by an exponential decay; use a small ratio")
        _check_warmup("optim", self.warmup_steps, self.warmup_tokens)
        no_spikes = self.rollback_steps is not None and self.spike_factor is None
        check(not no_spikes, f"optim.rollback_steps={self.rollback_steps} needs an optim.spike_factor, such as 3")

    @property
    def lr_schedule(self) -> LrSchedule:
        """The learning rate over all stages."""
        end = self.final_lr_ratio * self.lr if self.schedule in FALLING else None
        warmup = self.warmup_steps, self.warmup_tokens
        return LrSchedule(self.schedule, self.lr, end, *warmup, self.decay_fraction, self.decay_shape, False)


@dataclasses.dataclass(frozen=True)
class Train:
    dtype: str = one_of("auto", "float32", "bfloat16")
    remat: str
    context: str
    zigzag: bool = named("balance")
    kernel: str = one_of("auto", "reference", "blocked", "native", "splash", "tokamax", "cudnn")
    moe_kernel: str = one_of("auto", "blocked", "tokamax")
    loss_chunk: int = within(1, 2**31 - 1)
    mlp_chunk: int | None = within(1, 2**31 - 1)
    unroll: int = within(1, 2**31 - 1)
    overlap: bool
    statistics_every: int | None = within(1, MOST_STEPS)
    rank_statistics: bool
    sinks: tuple[str, ...]  # checked by the trainer, which knows the sinks
    log_every: int = within(1, MOST_STEPS, aliases=("log_interval", "logging_steps"))
    checkpoint_every: int = within(1, MOST_STEPS, aliases=("save_every", "save_interval", "save_steps"))
    keep: int = within(1, MOST_STEPS, aliases=("save_total_limit",))

    def __post_init__(self):
        check_fields(self, "train")
        measured = self.statistics_every is not None or not self.rank_statistics
        check(measured, "train.rank_statistics=True measures nothing with train.statistics_every=None; use a number of steps")
        check_once("train.sinks", self.sinks)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of a config of which a stage may override keys."""

    model: Model
    mesh: Mesh
    data: Data
    optim: Optim
    train: Train


@dataclasses.dataclass(frozen=True)
class Preference:
    """The settings of an objective of pairs (`train/objectives/preference.py`)."""

    beta: float | None = within(0, 10**6, above=True)
    margin: float | None = within(0, 10**6)
    alpha: float | None = within(0, 10**6)
    label_smoothing: float = within(0, 0.5, below=True)
    nll: float = within(0, 10**6)
    mean_log_probs: bool | None
    reference: str = one_of("frozen", "store")

    def __post_init__(self):
        check_fields(self, "preference")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with a sequence length, a batch and a mixture, which gives each source's share of the tokens.

    With `tokens` it has the fewest steps that see them; `steps` is then this number.
    """

    name: str | None
    steps: int | None = within(1, MOST_STEPS, aliases=("num_steps", "max_steps", "train_steps"))
    tokens: int | None = within(1, MOST_TOKENS, aliases=("num_tokens", "max_tokens", "train_tokens"))
    seq_len: int = within(1, LONGEST, aliases=("sequence_length", "context_length", "max_seq_len", "block_size"))
    batch: int = within(1, 2**24, aliases=("batch_size", "global_batch_size"))
    batch_ramp: tuple[int, ...] = within(1, 2**24, aliases=("rampup_batch_size", "batch_rampup"))
    batch_ramp_tokens: int | None = within(1, MOST_TOKENS)
    microbatches: int = within(1, 2**24, aliases=("gradient_accumulation_steps", "grad_accum", "accumulation"))
    mixture: Table[str, float] = within(0, 10**9)
    objective: str = named("loss")
    average_over: str = one_of("tokens", "documents")
    preference: Preference | None
    model_changes: tuple[str, ...]
    lr_schedule: LrSchedule | None
    override: Partial[Groups]
    trainable: tuple[str, ...]
    turn_patience: int | None = within(1, 1000)
    turn_indicator: str | None = one_of("entropy_bits", "renormalised_entropy_bits", "mass")

    def __post_init__(self):
        check_fields(self, "stages")
        fits = self.name is None or re.fullmatch(NAME, self.name) is not None
        check(fits, f"stages.name={self.name!r} must be at most 40 letters, digits and -_.+, with a letter or a digit first")
        tokens = self.batch * self.seq_len
        check(
            tokens < 2**31,
            f"batch={self.batch} times seq_len={self.seq_len} is {tokens:,} tokens a step; below 2^31 can be counted",
        )
        check(not self.mixture or any(self.mixture.values()), f"the weights of stages.mixture={self.mixture} sum to zero")
        self._check_ramp()
        if self.tokens is not None:
            steps = self._steps_of_tokens()
            both = f"steps={self.steps} and tokens={self.tokens} are both set, and these tokens take {steps:,} steps"
            check(self.steps in (None, steps), f"{both}; give one of the two, and None for the other")
            check(steps <= MOST_STEPS, f"tokens={self.tokens} take {steps:,} steps; at most {MOST_STEPS:,} can be counted")
            object.__setattr__(self, "steps", steps)
        check(self.steps is not None, "steps and tokens are both None; give the length of the stage in one of them")

    def _check_ramp(self) -> None:
        ramp, tokens, sizes = self.batch_ramp, self.batch_ramp_tokens, (*self.batch_ramp, self.batch)
        cure = "give both: the sizes before batch, and the tokens that they last together"
        check(bool(ramp) == (tokens is not None), f"batch_ramp={ramp} and batch_ramp_tokens={tokens}; {cure}, or neither")
        shown = f"batch_ramp={ramp} to batch={self.batch}"
        check(len(ramp) <= MOST_RAMP, f"{shown} has {len(ramp)} sizes, each compiled by itself; use at most {MOST_RAMP}")
        rises = all(a < b for a, b in zip(ramp, sizes[1:], strict=True))
        check(rises, f"{shown} does not rise with every size; name the smaller batches in order, without batch itself")

    @property
    def _ramp(self) -> list[tuple[int, int]]:
        """(steps, batch) of each size of the ramp: size i of n ends when i/n of `batch_ramp_tokens` are seen, or just above."""
        ramp, sequences, number = [], 0, len(self.batch_ramp)
        for i, size in enumerate(self.batch_ramp, 1):
            missing = i * self.batch_ramp_tokens - number * sequences * self.seq_len  # tokens times `number`
            steps = max(-(-missing // (number * size * self.seq_len)), 0)
            ramp.append((steps, size))
            sequences += steps * size
        return ramp

    def _steps_of_tokens(self) -> int:
        """The fewest steps that see `tokens`."""
        total, missing = 0, self.tokens
        for most, size in [*self._ramp, (math.inf, self.batch)]:
            steps = min(most, max(-(-missing // (size * self.seq_len)), 0))
            total, missing = total + steps, missing - steps * size * self.seq_len
        return total

    def spans(self, steps: int) -> list[tuple[int, int]]:
        """(steps, batch) of each batch size among the first `steps` steps, in order."""
        spans = []
        for most, size in [*self._ramp, (math.inf, self.batch)]:
            taken = min(most, steps)
            spans, steps = [*spans, (taken, size)] if taken else spans, steps - taken
        return spans

    def sequences(self, steps: int) -> int:
        """Packed sequences of the first `steps` steps."""
        return sum(number * size for number, size in self.spans(steps))

    def batch_at(self, step: int) -> int:
        """The batch size of a step, counted from 0 in the stage."""
        return self.spans(step + 1)[-1][1]


class Piece(NamedTuple):
    """Consecutive steps that share a learning-rate schedule: those of a stage, or of all stages where it is None.

    `spans` has the (steps, tokens of each) in order, which a schedule that counts tokens needs.
    """

    steps: int
    lr_schedule: LrSchedule | None
    spans: tuple[tuple[int, int], ...] = ()


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
        check_once("evals.names", self.names)


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
        named = self.path is None or bool(self.path.strip())
        check(named, f"init_from.path={self.path!r} names no checkpoint; use None for none")
        for name in ("step", "new", "ignore", "rename"):
            value = getattr(self, name)
            check(self.path is not None or value in (None, ()), f"init_from.{name}={value!r} needs an init_from.path")
        for entry, names in zip(self.rename, self.renamed, strict=True):
            check(len(names) == 2 and all(names), f"init_from.rename has {entry!r}; write 'OLD NAME -> NEW NAME'")

    @property
    def renamed(self) -> list[tuple[str, ...]]:
        """The name in the checkpoint and the name in this model of every entry of `rename`."""
        return [tuple(name.strip() for name in entry.split("->")) for entry in self.rename]


def check_min_length(stage: int, name: str, of_stage: Source, of_run: Source) -> None:
    """ValueError if a stage has documents that the run leaves out."""
    field, least = f"data.sources.{name}.min_length", of_run.min_length
    check(
        of_stage.min_length >= least,
        f"stages[{stage}].override.{field}={of_stage.min_length:,} is below {field}={least:,}, which leaves out shorter "
        f"documents of all stages; lower {field}",
    )


def check_rollback(optim: Optim, train: Train) -> None:
    """ValueError if the checkpoint of a rollback may have been deleted when its last spike comes."""
    if optim.rollback_steps is None:
        return
    every, needed = train.checkpoint_every, optim.rollback_steps + optim.max_consecutive_spikes
    check(
        needed <= (train.keep - 1) * every,
        f"optim.rollback_steps={optim.rollback_steps} and optim.max_consecutive_spikes={optim.max_consecutive_spikes} need "
        f"checkpoints of the last {needed} steps, and train.keep={train.keep} of one every {every} steps are of "
        f"{(train.keep - 1) * every}; use train.keep={-(-needed // every) + 1} or more",
    )
