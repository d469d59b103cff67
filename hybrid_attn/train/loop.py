"""A training run: mesh, data, checkpoint, steps, evaluation."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from hybrid_attn import checkpoint, config, trees
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.data import corpora, pipeline
from hybrid_attn.data.corpora import Corpus
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer, check_vocab, load_tokenizer
from hybrid_attn.model import Execution, specs
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.identity import data_identity, references_identity
from hybrid_attn.parallel.mesh import make_mesh, on_mesh
from hybrid_attn.parallel.processes import Peers
from hybrid_attn.train import console, curves, init_from, profile, references, resume, sinks, turn
from hybrid_attn.train.evaluation import Evaluations, check_names
from hybrid_attn.train.goodput import Goodput
from hybrid_attn.train.metrics import Metrics, peak_flops, set_aside
from hybrid_attn.train.objectives import check_pairs
from hybrid_attn.train.resume import Range, check_arrays, check_function, check_overrides, check_rate, merge_skipped, text_of
from hybrid_attn.train.rollback import RECORD, Rollback, TooManySpikes, roll_back, skipped_after
from hybrid_attn.train.schedule import schedule
from hybrid_attn.train.step import TrainState, abstract_state, executions, extras_at, init_state, make_steps, with_extras
from hybrid_attn.train.steps import Loop
from hybrid_attn.train.stop import Stop, hold
from hybrid_attn.train.trainable import is_trained
from hybrid_attn.train.workdir import write_config


def train(
    c: config.Config,
    workdir: str,
    peers: Peers | None = None,
    execution: Execution | None = None,
    **flags,
) -> bool:
    """Trains `c` in `workdir` from its newest checkpoint, or from the start; False if a signal stopped it before the end.

    `peers` are those of `processes.start`, if several processes train; the workdir is then one that all of them see.
    `execution` is that of every step and evaluation; by default it is that of the config on this platform. `flags` are those of
    `Flags`.

    ValueError where the config, the data or a checkpoint does not fit, where the learning rate would jump, and where the model
    would compute another function; FloatingPointError when the loss or the parameters are not finite; BlockingIOError when
    another run is in `workdir`; OSError when a file cannot be written or read, after saving if possible.
    """
    flags, goodput = Flags(**flags), Goodput()
    check_names(c.evals.names)
    turn.check_rule(c)
    references.check_stages(c)
    profile.check_range(flags.profile, 0, c.total_steps)
    sinks.check_names(c.train.sinks)
    schedule(c.optim, c.pieces)  # ValueError for stages whose rates do not meet, before anything is written
    for stage in c.each_stage:
        is_trained(stage, specs(stage.model))
    fit.check(c, jax.device_count())
    of_stages = [execution] * len(c.stages) if execution else executions(c, jax.default_backend())
    meshes = [make_mesh(stage.mesh) for stage in c.each_stage]
    with jax.set_mesh(meshes[0]):
        check_overrides(c)
    data = load_data(c)
    if peers:
        peers.agree(data_identity(data.corpora, data.tokenizer))
    with hold(workdir), Stop(peers) as stop, jax.set_mesh(meshes[0]), checkpoints_of(c, workdir) as checkpoints:
        step_fns = make_steps(c, of_stages), make_steps(c, of_stages, statistics=True)
        trace = profile.Profile(flags.profile, Path(workdir) / "profile")
        run = Run(c, workdir, flags, of_stages, meshes, data, checkpoints, stop, *step_fns, trace, peaks_of(of_stages, meshes))
        ended = train_from_newest(run, goodput, flags.skip_steps, None)
        while not isinstance(ended, bool):
            ended = train_from_newest(run, Goodput(), *ended)
        return ended


class Flags(NamedTuple):
    """What the command line says of one start of a run; steps are numbered from 1.

    The batches of `skip_steps` are passed over, and those that the checkpoint records. `allow_lr_jump` lets the learning rate
    differ from the checkpoint's schedule. The steps of `profile` are traced.
    """

    skip_steps: Sequence[Range] = ()
    allow_lr_jump: bool = False
    profile: Range | None = None


class Run(NamedTuple):
    """What a run keeps when it goes back to a checkpoint; the lists are by stage."""

    config: config.Config
    workdir: str
    flags: Flags
    executions: Sequence[Execution]
    meshes: Sequence[Mesh]
    data: "TrainingData"
    checkpoints: Checkpoints
    stop: Stop
    step_fns: Sequence[Callable]
    statistics_fns: Sequence[Callable]
    trace: profile.Profile
    peaks: Sequence[tuple[float, str]]


def train_from_newest(
    run: Run, goodput: Goodput, skip_steps: Sequence[Range], rollback: Rollback | None
) -> bool | tuple[Sequence[Range], Rollback]:
    """What `train` returns; or after too many spikes the `skip_steps` and the rollback with which to call this again.

    `rollback` is the one after which the newest checkpoint is that of its step.
    """
    c, workdir, checkpoints = run.config, run.workdir, run.checkpoints
    newest_mesh = run.meshes[c.next_stage(checkpoints.latest() or 0)]
    with jax.set_mesh(newest_mesh):
        state, start, recorded = first_state(c, run.data.identities, newest_mesh, checkpoints)
    stored_references = references.read(c, run.data.corpora, start)
    if run.stop.peers and stored_references:
        run.stop.peers.agree(references_identity(stored_references))
    references.check_model(c, stored_references, recorded)
    recorded["skipped_steps"] = merge_skipped(skip_steps, recorded["skipped_steps"], start, c.total_steps)
    if rollback is not None:
        recorded[RECORD] = [*recorded.get(RECORD, ()), rollback]
    else:
        profile.check_range(run.flags.profile, start, c.total_steps)
    history = past(c, checkpoints, start, recorded, run.flags.allow_lr_jump)
    evaluations = Evaluations(c, run.executions, run.meshes, run.data.tokenizer, run.data.corpora, workdir)
    evaluations.draw_questions()
    index = c.next_stage(start)
    metrics = opened_metrics(run, index, start)
    metrics.say(*history, *evaluations.left_out())
    if start == c.total_steps and evaluations.is_done(start):
        metrics.say(f"nothing left to train: {start} steps are done; add steps or a stage")
        close(c, workdir, metrics, evaluations)
        return True
    metrics.say(*write_config(Path(workdir), c, start), *goodput.open(Path(workdir), start))
    state = on_mesh(state, run.meshes[index], donate=True)  # a damaged checkpoint may have been of another stage
    loop = loop_of(run, state, start, recorded, metrics, evaluations, goodput)
    try:
        with picture_after(loop, Path(workdir)):
            loop.train()
            loop.save(wait=True)
    except TooManySpikes as spikes:
        rollback, lines = roll_back(c, checkpoints, spikes, recorded)
        metrics.say(*lines)
        goodput.rest("lost")
        goodput.record(spikes.last)  # the steps since the checkpoint count as repeated
        goodput.close()
        metrics.close()
        return skipped_after(rollback, recorded["skipped_steps"]), rollback
    return finish(loop, workdir, evaluations)


def loop_of(
    run: Run, state: TrainState, start: int, recorded: dict, metrics: Metrics, evaluations: Evaluations, goodput: Goodput
) -> Loop:
    """The loop over the steps after `start`."""
    return Loop(
        run.config,
        run.step_fns,
        run.meshes,
        pipeline.batches(run.config, run.data.stages, run.meshes, start),
        run.checkpoints,
        metrics,
        run.stop,
        data_state=lambda step: data_state(run.config, run.data.identities, step, recorded | template(run, step)),
        measure=lambda params: evaluations.measure(params, metrics, run.stop.is_requested),
        is_over=evaluations.is_over,
        state=state,
        step=start,
        peaks=[peak for peak, _ in run.peaks],
        skipped=recorded["skipped_steps"],
        goodput=goodput,
        profile=run.trace,
        statistics_fns=run.statistics_fns,
    )


class TrainingData(NamedTuple):
    """The tokenizer of a run, its corpora by source, and the packed sequences and the data identity of each stage."""

    tokenizer: ByteTokenizer | JsonTokenizer
    corpora: Mapping[str, Corpus]
    stages: list[pipeline.MixedSequences]
    identities: list[dict]


def load_data(c: config.Config) -> TrainingData:
    """Reads the sources of a config; ValueError where the vocabulary or a source does not fit."""
    tokenizer = load_tokenizer(c.data.tokenizer)
    check_vocab(tokenizer, c.model.vocab_size, c.data.tokenizer)
    loaded = corpora.load(c.data, c.sources, tokenizer)
    for stage in c.each_stage:
        check_pairs(stage, [name for name in stage.mixture if loaded[name].heldout_pairs is None])
    training = {name: corpus.training for name, corpus in loaded.items()}
    stages = pipeline.stage_sequences(c, training, tokenizer)
    return TrainingData(tokenizer, loaded, stages, pipeline.identities(c, training, tokenizer))


@contextlib.contextmanager
def checkpoints_of(c: config.Config, workdir: str) -> Iterator[Checkpoints]:
    """The checkpoints of a run, closed after the body. Ctrl-C does not wait for the one that is being written."""
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", c.train.keep, c.train.checkpoint_every)
    try:
        yield checkpoints
    except KeyboardInterrupt:
        checkpoints.abandon()
        raise
    finally:
        checkpoints.close()


def opened_metrics(run: Run, index: int, start: int) -> Metrics:
    """The metrics of a run from step `start`, which is in the stage `index`, after its description is printed."""
    c, workdir = run.config, run.workdir
    peaks = {
        x.dtype: f"{peak:.4g} FLOP/s in {x.dtype}, {how}" for x, (peak, how) in zip(run.executions, run.peaks, strict=True)
    }
    peak_line = f"{'; '.join(peaks.values())}; MFU is the share of it"
    renamed = set_aside(Path(workdir), start, 2 * c.train.checkpoint_every)
    metrics = Metrics(workdir, start, c).open()
    lines = console.description(c, run.executions[index], run.meshes[index], peak_line, run.data.stages, workdir, start)
    metrics.say(*renamed, *lines)
    return metrics


def peaks_of(executions: Sequence[Execution], meshes: Sequence[Mesh]) -> list[tuple[float, str]]:
    """By stage, the FLOP/s of all devices together in its dtype, and whether they were looked up or measured."""
    of_device = {dtype: peak_flops(jax.devices()[0], dtype) for dtype in {x.dtype for x in executions}}
    of_stages = [(of_device[x.dtype], mesh.size) for x, mesh in zip(executions, meshes, strict=True)]
    return [(size * peak, how) for (peak, how), size in of_stages]


@contextlib.contextmanager
def picture_after(loop: Loop, workdir: Path) -> Iterator[None]:
    """Draws the loss and the schedule after the body, which trains, or where its numbers are not finite any more.

    An error of the picture is printed: nothing of a run depends on it.
    """

    def draw() -> None:
        if jax.process_index():
            return
        try:
            first_steps = itertools.accumulate((stage.steps for stage in loop.config.stages[:-1]), initial=0)
            curves.write(workdir, dict(zip(first_steps, loop.config.stage_names, strict=True)))
        except Exception as error:
            loop.metrics.say(f"{curves.PICTURE} is not drawn: {type(error).__name__}: {error}")

    try:
        yield
    except FloatingPointError:
        draw()
        raise
    draw()


def finish(loop: Loop, workdir: str, evaluations: Evaluations) -> bool:
    """Evaluates a run whose steps are saved; False if a signal stopped it. OSError where an error of a file ended the steps."""
    total, metrics, stop = loop.config.total_steps, loop.metrics, loop.stop
    if error := stop.failure:
        metrics.write_again()
        what = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        raise OSError(f"{what}; step {loop.step} is saved; mend that and run the same command again")
    if loop.has_turned:
        tell_goodput(loop)
        close(loop.config, workdir, metrics, evaluations)
        return True
    if loop.step < total:
        tell_goodput(loop)
        metrics.say(f"stopped after step {loop.step}, which is saved; the same command goes on from there")
        return False
    interrupted = f"stopped in the evaluation; all {total} steps are saved, the same command goes on with it"
    try:
        stop.all_saved(interrupted)
        loop.goodput.rest("other")
        complete = loop.measure(loop.state.params)
        loop.goodput.rest("evaluation")
        if not complete:
            metrics.say(interrupted)
        tell_goodput(loop)
        close(loop.config, workdir, metrics, evaluations if complete else None)
        return complete
    except KeyboardInterrupt:
        if not stop.saved:
            raise
        metrics.say(interrupted)
        return False


def tell_goodput(loop: Loop) -> None:
    """Prints where the seconds of the run went, and records it."""
    loop.metrics.say(*loop.goodput.table())
    with contextlib.suppress(OSError):  # all steps are saved, and a full disk is no reason to fail
        loop.goodput.record(loop.step)
    loop.goodput.close()


def close(c: config.Config, workdir: str, metrics: Metrics, evaluations: Evaluations | None) -> None:
    """Closes the metrics of a run, and prints what to do next where its `evaluations` are done."""
    if evaluations is not None:
        own_files = bool(corpora.locations(c.data, c.sources))
        chats = checkpoint.chat_template(checkpoint.read_data(Path(workdir) / "checkpoints")) is not None
        metrics.say(*console.experts(metrics.last))
        metrics.say(*console.ending(workdir, metrics.step, evaluations.report_of(metrics.step), own_files, chats))
        metrics.say(*turn.ending(c, Path(workdir), metrics.step))
    metrics.close()


def past(c: config.Config, checkpoints: Checkpoints, start: int, recorded: dict, allow_lr_jump: bool) -> list[str]:
    """Lines for the checkpoint of step `start`, skipped steps, and changes of the config and of extras since.

    ValueError where the learning rate would jump; before the first step any rate is allowed. ValueError where the model would
    compute another function and the stage does not say so. Of an imported checkpoint only the model is compared, because it was
    not trained with the remaining config.
    """
    new, skipped = checkpoints.latest() is None, recorded["skipped_steps"]
    if new:
        begins = "none found; starting at step 0"
    elif start > 0:
        begins = f"step {start} found; going on from there"
    elif "imported" in recorded:
        begins = f"step 0 found; restored parameters of {recorded['imported']}"
    else:
        begins = "step 0 found: a run that was stopped before its first step"
    lines = [f"checkpoint   {begins}", *init_from.lines(c.init_from, recorded, new)]
    lines += [f"skipped      steps {text_of(skipped)}: their batches are passed over"] if skipped else []
    if new:
        return lines
    saved = checkpoint.read_config(checkpoints.directory, start)
    lines += extras_lines(c, checkpoint.extras(checkpoints.directory, start), start)
    lines += check_function(saved, c, start)
    if start == 0 and "imported" in recorded:
        return lines
    if changed := trees.differences(saved, config.to_dict(c)):
        lines.append(f"config       differs from that of the checkpoint of step {start} (old -> new):")
        lines += [f"             {line}" for line in changed]
    return lines + (check_rate(saved, c, start, allow_lr_jump) if 0 < start < c.total_steps else [])


def extras_lines(c: config.Config, saved: set[str], step: int) -> list[str]:
    """Lines for the extras that either the config or the checkpoint of `step`, which has those of the names `saved`, lacks."""
    expected, of = extras_at(c, c.last_stage(step)).keys(), f"in the checkpoint of step {step}"
    added = [f"extras       {name}: not {of}; starts from its initial value" for name in sorted(expected - saved)]
    return added + [f"extras       {name}: {of}, and not in this config; left out" for name in sorted(saved - expected)]


def first_state(
    c: config.Config, identities: Sequence[dict], mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, int, dict]:
    """The state of the newest checkpoint or a new one, its number of steps, and further records of its data state.

    `identities` are those of `pipeline.identities`. ValueError where the config has other arrays, or has other batches or
    another objective in a stage that the checkpoint has begun and not finished.
    """
    if checkpoints.latest() is None and c.init_from.path is not None:
        state, record = init_from.first_state(c, mesh, identities[0]["tokenizer"])
        return state, 0, {"skipped_steps": [], "init_from": record}
    if checkpoints.latest() is None:
        return jax.jit(init_state, static_argnums=0)(c), 0, {"skipped_steps": []}
    if (newest := checkpoints.newest_config()) is not None:
        check_arrays(newest[1], c, newest[0], f"the checkpoint of step {newest[0]} in {checkpoints.directory}")
    step, state, saved = checkpoints.restore(lambda step: abstract_state(c, mesh, c.last_stage(step)))
    state = with_extras(c, c.last_stage(step), state)
    expected = data_state(c, identities, step, {})
    done = saved["stage_steps"]
    if done != expected["stage_steps"]:
        raise ValueError(resume.other_steps(c, step, done, expected["stage_steps"]))
    if done and done[-1] < c.stages[len(done) - 1].steps:
        stage, lines = f"stages[{len(done) - 1}]", trees.differences(resume.completed(saved["stage"]), expected["stage"], "  ")
        trees.check(
            not lines,
            f"the checkpoint of step {step} is in the middle of {stage}, and this config has other batches or another "
            "objective there (saved -> new):\n" + "\n".join(lines) + f"\nuse the saved values; or end that stage with "
            f"{stage}.steps={done[-1]}{resume.without_tokens(c)}, and give the new values to a stage after it",
        )
    records = {key: value for key, value in saved.items() if key not in expected}
    return state, step, {"skipped_steps": []} | records  # older checkpoints have no skipped steps


def template(run: Run, step: int) -> dict:
    """A record of the chat template of the conversations that were trained on, for the data state after `step` steps."""
    text = corpora.chat_template(run.config, run.data.corpora, step)
    return {} if text is None else {checkpoint.CHAT_TEMPLATE: text}


def data_state(c: config.Config, identities: Sequence[dict], step: int, records: dict) -> dict:
    """The data state after `step` steps: the steps of each stage begun, the identity of the last of them, and `records`."""
    done = [steps for steps in c.stage_steps(step) if steps]
    return {**records, "stage_steps": done, "stage": identities[len(done) - 1] if done else {}}
