"""The parts of a config that describe a run: mesh, data, optimiser, stages, evaluations. Others import them from `config`."""

import dataclasses
from typing import NamedTuple

from hybrid_attn.config_model import LONGEST
from hybrid_attn.trees import Table, check, check_fields, named, one_of, within

MOST_STEPS = 10**9
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


def shortest_sequence(source: Source) -> int:
    """The fewest tokens of a sequence of the source's task."""
    form = TASKS[source.task]
    return form.tokens + form.tokens_a_pair * source.pairs


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
    independent_decay: bool
    clip_norm: float = within(0, 10**12, above=True, aliases=("grad_clip", "max_grad_norm", "gradient_clipping"))
    schedule: str = one_of(*SHAPES)
    warmup_steps: int = within(0, MOST_STEPS)
    decay_fraction: float = within(0, 1, above=True)
    decay_shape: str = one_of(*DECAY_SHAPES)
    final_lr_ratio: float = within(0, 1, aliases=("min_lr_ratio",))
    z_loss: float = within(0, 1)
    ema_half_life: float | None = within(0, 1, above=True)
    spike_factor: float | None = within(1, 10**6, above=True)
    max_consecutive_spikes: int = within(1, 10_000)

    def __post_init__(self):
        check_fields(self, "optim")
        zero = self.schedule == "wsd" and self.decay_shape == "exponential" and self.final_lr_ratio == 0
        check(not zero, "optim.final_lr_ratio=0 is never reached by an exponential decay; use a small ratio")

    @property
    def lr_schedule(self) -> LrSchedule:
        """The learning rate over all stages."""
        end = self.final_lr_ratio * self.lr if self.schedule in FALLING else None
        return LrSchedule(self.schedule, self.lr, end, self.warmup_steps, self.decay_fraction, self.decay_shape, False)


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
    lr_schedule: LrSchedule | None

    def __post_init__(self):
        check_fields(self, "stages")
        tokens = self.batch * self.seq_len
        check(
            tokens < 2**31,
            f"batch={self.batch} times seq_len={self.seq_len} is {tokens:,} tokens a step; below 2^31 can be counted",
        )
        check(not self.mixture or any(self.mixture.values()), f"the weights of stages.mixture={self.mixture} sum to zero")


class Piece(NamedTuple):
    """Consecutive steps that share a learning-rate schedule: those of a stage, or of all stages where it is None."""

    steps: int
    lr_schedule: LrSchedule | None


@dataclasses.dataclass(frozen=True)
class Train:
    dtype: str = one_of("auto", "float32", "bfloat16")
    remat: str
    context: str
    zigzag: bool = named("balance")
    kernel: str = one_of("auto", "reference", "blocked", "splash", "tokamax", "cudnn")
    loss_chunk: int = within(1, 2**31 - 1)
    mlp_chunk: int | None = within(1, 2**31 - 1)
    statistics_every: int | None = within(1, MOST_STEPS)
    sinks: tuple[str, ...]  # checked by the trainer, which knows the sinks
    log_every: int = within(1, MOST_STEPS, aliases=("log_interval", "logging_steps"))
    checkpoint_every: int = within(1, MOST_STEPS, aliases=("save_every", "save_interval", "save_steps"))
    keep: int = within(1, MOST_STEPS, aliases=("save_total_limit",))

    def __post_init__(self):
        check_fields(self, "train")
        for name in self.sinks:
            check(self.sinks.count(name) == 1, f"train.sinks={self.sinks} names {name!r} twice")


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
