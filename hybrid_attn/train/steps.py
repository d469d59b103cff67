"""The loop over training steps: read a batch, dispatch the step, report the step before, save and evaluate when due.

The line of a step has values of the step, averages since the last line, and the progress of the run.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from hybrid_attn import trees
from hybrid_attn.checkpoint import INIT_FROM, IS_BASE, Checkpoints
from hybrid_attn.config import Config, to_dict
from hybrid_attn.parallel.mesh import on_mesh
from hybrid_attn.train import edge, spikes, statistics
from hybrid_attn.train.console import stage_of
from hybrid_attn.train.cost import flops_per_token
from hybrid_attn.train.goodput import Goodput
from hybrid_attn.train.metrics import Metrics
from hybrid_attn.train.precompile import NextStep
from hybrid_attn.train.profile import Profile
from hybrid_attn.train.resume import Range, is_skipped
from hybrid_attn.train.rollback import TooManySpikes
from hybrid_attn.train.step import TrainState, begin_stage, forget_history, skip_step
from hybrid_attn.train.stop import Stop
from hybrid_attn.train.trainable import without_base

AVERAGED = ("loss", "bits_per_byte")


@dataclasses.dataclass
class Loop:
    """A run between two steps: `state` is that after `step` steps.

    `step_fns` are the steps of `make_step` by stage, `statistics_fns` those that measure statistics, and `meshes` those that
    the stages run on. `batches` yields (step, batch), `data_state` gives the data state after a step, and `measure` evaluates
    parameters and returns whether that came to its end. `peaks` are the FLOP/s of all devices together, by stage, of which MFU
    is the share. The batches of the `skipped` steps are read and not trained on; the steps of `profile` are traced.
    `is_over` says whether the run ends after the evaluation of a step, once that came to its end.
    """

    config: Config
    step_fns: Sequence[Callable]
    meshes: Sequence[Mesh]
    batches: Iterator
    checkpoints: Checkpoints
    metrics: Metrics
    stop: Stop
    data_state: Callable[[int], dict]
    measure: Callable[[dict], bool]
    state: TrainState  # on the mesh of the next step
    step: int
    peaks: Sequence[float]
    skipped: Sequence[Range] = ()
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    profile: Profile = dataclasses.field(default_factory=lambda: Profile(None, Path()))
    statistics_fns: Sequence[Callable] = ()
    is_over: Callable[[int], bool] = lambda step: False

    def __post_init__(self):
        self.first = self.step + 1
        self.mesh = self.meshes[self.config.next_stage(self.step)]  # that of the state
        self.progress = Progress(self.config, self.skipped, self.peaks)
        self.metrics.position = self.progress.position
        # Step, metrics that are not read yet, and the seconds of its compilation, None where there was none.
        self.dispatched: tuple[int, Mapping, float | None] | None = None
        self.compiled = set()  # the step functions that have been called, with the size of the batch
        self.stage: int | None = None  # of the last step that was reported
        self.has_turned = False  # whether `is_over` ended the steps
        self.next_step = NextStep(self.config, self.step_fns, self.meshes)
        self.goodput.rest("start")
        self.restart_clock()

    def train(self) -> None:
        """Trains until the last step or a signal, each stage on its mesh."""
        goes_on = True
        try:
            while goes_on and self.step < self.config.total_steps:
                stage, done = self.config.stage_at(self.step)
                with jax.set_mesh(self.meshes[stage]):
                    self.enter_mesh(self.meshes[stage])
                    goes_on = self.train_stage(stage, self.step - done + self.config.stages[stage].steps)
            self.report()
        finally:
            if self.profile.is_open:
                self.metrics.say(self.profile.stop())

    def train_stage(self, stage: int, end: int) -> bool:
        """Trains until step `end`, the last of a stage; False if the run must end before.

        The metrics of a step are read after the next step is dispatched. Parameters are evaluated every `evals.every` steps,
        and before the first step here too: an earlier process may have been stopped before their evaluation ended. The stage
        begins once its first batch is read, because the state that is evaluated or saved before is that of the stage before it.
        """
        every, measured_every = self.config.evals.every, self.config.train.statistics_every
        while self.step < end:
            if self.stop.reached(self.step):
                return False
            is_due = every is not None and self.step > 0 and self.step % every == 0
            if is_due and not self.evaluate():
                return False
            if is_due and self.is_over(self.step):
                self.has_turned = True
                return False
            batch = self.next_batch()
            if batch is None:
                return False
            self.trace(self.step + 1)
            if self.config.stage_at(self.step) == (stage, 0):
                self.begin_stage(stage)
            self.step += 1
            if is_skipped(self.step, self.skipped):
                self.skip()
            else:
                measured = measured_every is not None and self.step % measured_every == 0
                self.dispatch(batch, (self.statistics_fns if measured else self.step_fns)[stage])
                self.next_step.begin(self.step, self.state)
            if self.checkpoints.due(self.step) and self.step < self.config.total_steps:
                self.report()  # so that no state is saved whose loss has not been checked
                self.save()
        return True

    def enter_mesh(self, mesh: Mesh) -> None:
        """Shards the state over the mesh of a stage."""
        if mesh != self.mesh:
            self.report()
            self.mesh = mesh
            self.state = on_mesh(self.state, mesh, donate=True)

    def begin_stage(self, stage: int) -> None:
        """Turns the state into that of a stage.

        Where the stage begins with another loss, other factors or other trained parameters, the losses and norms until now are
        forgotten.
        """
        if edge.changes_arrays(self.config, stage):
            self.report()
        self.state = begin_stage(self.config, stage, self.state)
        around = self.config.each_stage[max(stage - 1, 0) : stage + 1]
        losses = {(x.trainable, x.objective, x.average_over, x.preference, x.model.low_rank) for x in around}
        if len(losses) == 2 and spikes.NAME in self.state.extras:
            self.state = forget_history(self.state)

    def trace(self, step: int) -> None:
        """Begins or ends the trace of the steps to profile, where one of these is due before `step`."""
        begins, ends = self.profile.begins(step), self.profile.ends(step)
        if begins or ends:
            self.report()
            jax.block_until_ready(self.state)
        with self.stop.after_saving():
            if ends:
                self.metrics.say(self.profile.stop())
            elif begins:
                self.profile.start()

    def save(self, wait: bool = False) -> None:
        """Writes a checkpoint; with `wait`, to its end."""
        data, state = self.data_state(self.step), self.state
        if data.get(INIT_FROM, {}).get(IS_BASE):
            state = state._replace(params=without_base(self.config, state.params))
        with self.goodput.timed("checkpoint"):
            self.checkpoints.save(self.step, state, data, to_dict(self.config), wait=wait)
        with self.stop.after_saving():
            self.goodput.record(self.step)

    def evaluate(self) -> bool:
        """Evaluates the parameters as they are; False if that did not come to its end."""
        self.report()
        complete = False
        with self.stop.after_saving(together=True):
            complete = self.measure(self.state.params)
        self.goodput.rest("evaluation")
        with self.stop.after_saving():
            self.goodput.record(self.step)
        self.restart_clock()
        return complete

    def next_batch(self) -> dict | None:
        """The next batch; None where it cannot be read, and the run ends."""
        before, batch = time.perf_counter(), None
        with self.stop.after_saving(together=True):
            _, batch = next(self.batches)
        waited = time.perf_counter() - before
        self.waited += waited
        self.goodput.add("data", waited)
        return batch

    def skip(self) -> None:
        """Counts the step without training on its batch."""
        self.report()
        self.state = skip_step(self.state)
        self.stop.first_step_began()
        with self.stop.after_saving():
            self.metrics.skip(self.step, "its batch is passed over, as --skip_steps or a rollback says")
        self.metrics.advance(self.step)
        self.goodput.skip()
        self.restart_clock()

    def dispatch(self, batch: dict, step_fn: Callable) -> None:
        """Starts the step on its batch, and reports the step before meanwhile."""
        program = step_fn, self.config.batch_at(self.step - 1)
        new = program not in self.compiled
        if new:
            self.report()  # first, because the compilation is not part of the time of the step before
        before = time.perf_counter()
        self.next_step.wait(step_fn)
        with self.profile.step(self.step):
            self.state, metrics = step_fn(self.state, batch)
        seconds = time.perf_counter() - before if new else None
        self.goodput.add("compile", seconds or 0.0)
        self.stop.first_step_began()
        self.report()
        self.dispatched = self.step, metrics, seconds
        self.compiled.add(program)

    def report(self) -> None:
        """Waits for the dispatched step, if there is one, checks its metrics and logs them when a line is due."""
        if self.dispatched is None:
            return
        number, metrics, compile_seconds = self.dispatched
        values = jax.device_get(metrics)
        now = time.perf_counter()
        self.dispatched = None
        if measured := values.pop("statistics", None):
            with self.stop.after_saving():
                self.metrics.statistics(number, statistics.numbers(measured))
        values = jax.tree.map(float, values)
        if consecutive := int(values.pop("consecutive_spikes", 0)):
            self.skip_spike(number, values, consecutive)
            return
        check_finite(number, values, self.checkpoints)
        stage, _ = self.config.stage_at(number - 1)
        batch, compiled = self.config.batch_at(number - 1), compile_seconds is not None
        self.goodput.rest("step")
        self.progress.steps.append(Timed(values, now - self.clock, self.waited, compiled, stage, batch))
        if self.stage not in (None, stage):
            self.metrics.say(edge_line(self.progress.position(number), now - self.clock, compile_seconds or 0.0))
            self.metrics.say(*(f"             {line}" for line in overridden(self.config, stage)))
        self.stage = stage
        if number % self.config.train.log_every == 0 or number in (self.first, self.config.total_steps):
            with self.stop.after_saving():
                self.goodput.record(number)
                self.metrics.log(number, self.progress.line(number) | {"goodput": self.goodput.share()})
        self.metrics.advance(number)
        self.restart_clock(now)

    def skip_spike(self, number: int, values: Mapping[str, float], consecutive: int) -> None:
        """Records the last of so many consecutive spikes; TooManySpikes if these are too many."""
        optim = self.config.optim
        what = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        with self.stop.after_saving():
            self.metrics.skip(number, f"{what}: not finite, or above {optim.spike_factor:g} x the median; no update is taken")
        self.metrics.advance(number)
        self.goodput.skip()
        self.restart_clock()
        if consecutive > optim.max_consecutive_spikes:
            newest, checkpoint_note = newest_checkpoint(self.checkpoints)
            first = number - consecutive + 1
            raise TooManySpikes(
                f"steps {first} to {number} are spikes ({what} at the last), more than optim.max_consecutive_spikes="
                f"{optim.max_consecutive_spikes}; {checkpoint_note}; lower the learning rate, or pass over the batches with "
                f"--skip_steps={max(first, newest + 1)}:{number}",
                first,
                number,
            )

    def restart_clock(self, now: float | None = None) -> None:
        """Starts the time of the next step, by default now; nothing has been waited for yet."""
        self.clock, self.waited = time.perf_counter() if now is None else now, 0.0


def edge_line(position: Mapping, seconds: float, compile_seconds: float) -> str:
    """The cost of the edge before a stage: the time from the end of the last step before it to the end of its first."""
    stage = stage_of(position)[0]
    return f"{stage} begins: {seconds:.1f} s at the edge and in its first step, of which compile {compile_seconds:.1f} s"


def overridden(c: Config, stage: int) -> list[str]:
    """Lines for the fields of the config that differ between a stage and the one before it, by their overrides."""
    before, after = ({name: to_dict(group) for name, group in c.groups(i).items()} for i in (stage - 1, stage))
    return trees.differences(before, after)


def check_finite(step: int, values: Mapping[str, float], checkpoints: Checkpoints) -> None:
    """FloatingPointError if the loss, the learning rate or a norm (of the gradient, of the new parameters) is not finite."""
    names = ("loss", "grad_norm", "lr", "param_norm")
    bad = [f"{name} is {values[name]}" for name in names if not math.isfinite(values[name])]
    if not bad:
        return
    _, checkpoint_note = newest_checkpoint(checkpoints)
    cure = f"lower the learning rate or raise its warmup_steps, or pass over the batch with --skip_steps={step}"
    if not math.isfinite(values["lr"]):
        cure = "mend the learning rate: optim.lr, optim.schedule, optim.final_lr_ratio"
    raise FloatingPointError(f"step {step}: {' and '.join(bad)}; {checkpoint_note}; {cure}")


def newest_checkpoint(checkpoints: Checkpoints) -> tuple[int, str]:
    """The step of the newest checkpoint, or 0, and what an error says about it."""
    checkpoints.wait()  # it may still be being written
    newest = checkpoints.latest()
    if newest is None:
        return 0, "no checkpoint was written yet"
    return newest, f"the checkpoint of step {newest} is kept"


class Timed(NamedTuple):
    """A finished step: its metrics, the seconds since the end of the step before, and how many of them it waited for data."""

    values: Mapping[str, float]
    seconds: float
    waited: float
    compiled: bool  # the seconds include compilation
    stage: int
    batch: int


class Progress:
    """The steps since the last line, and the tokens and FLOPs of the whole run; `peaks` are FLOP/s by stage."""

    def __init__(self, c: Config, skipped: Sequence[Range], peaks: Sequence[float]):
        self.config, self.stages, self.skipped, self.peaks, self.steps = c, c.each_stage, skipped, peaks, []
        self.flops = [flops_per_token(stage) for stage in self.stages]  # by token
        self.tokens = c.stage_tokens(c.total_steps)
        self.flops_per_second = math.nan

    def line(self, number: int) -> dict[str, float]:
        """The values of the line of step `number`.

        The step's own metrics are unchanged; `loss_mean` and `bits_per_byte_mean` are means over the `steps` since the last
        line. `step_time` and `data_wait`, in seconds, are means over the steps without compilation, or over all steps if there
        is none; `tokens_per_s` and `mfu` are then NaN. `tokens_seen` counts from the start of the run; `seconds_left` assumes
        the speed of this line and leaves out evaluations.
        """
        steps, self.steps = self.steps, []
        steady = [step for step in steps if not step.compiled]
        timed = steady or steps
        values = dict(steps[-1].values) | {"steps": len(steps)}
        values |= {f"{name}_mean": _mean([step.values[name] for step in steps]) for name in AVERAGED}
        values |= {"step_time": _mean([x.seconds for x in timed]), "data_wait": _mean([x.waited for x in timed])}
        spent = [(x.stage, x.batch * self.stages[x.stage].seq_len) for x in steady]
        at_peak = _mean([tokens * self.flops[stage] / self.peaks[stage] for stage, tokens in spent])  # seconds
        values |= {"tokens_per_s": _mean([n for _, n in spent]) / values["step_time"], "mfu": at_peak / values["step_time"]}
        if steady:
            self.flops_per_second = _mean([tokens * self.flops[stage] for stage, tokens in spent]) / values["step_time"]
        values |= self.position(number) | {"seq_len": self.stages[steps[-1].stage].seq_len, "batch": steps[-1].batch}
        stages = zip(self.tokens, self.config.stage_tokens(number), self.flops, strict=True)
        left = sum((tokens - done) * per_token for tokens, done, per_token in stages)
        values["seconds_left"] = left / self.flops_per_second
        stats = [device.memory_stats() or {} for device in jax.local_devices()]  # empty where a device does not report them
        peaks = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
        if peaks:
            values["peak_memory_bytes"] = max(peaks)
        return values

    def position(self, step: int) -> dict[str, int | str]:
        """What a record after so many steps says of where the run is: its stage and the tokens seen."""
        index, _ = self.config.stage_at(max(step, 1) - 1)
        stage = {"stage": index + 1, "stages": len(self.stages), "stage_name": self.stages[index].name}
        return stage | {"tokens_seen": self.tokens_seen(step)}

    def tokens_seen(self, step: int) -> int:
        """Tokens of the first `step` steps but for those of --skip_steps; padding and spikes count."""
        skipped = [(min(first - 1, step), min(last, step)) for first, last in self.skipped]
        return self._tokens_until(step) - sum(self._tokens_until(end) - self._tokens_until(start) for start, end in skipped)

    def _tokens_until(self, step: int) -> int:
        return sum(self.config.stage_tokens(step))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
