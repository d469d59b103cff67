"""A training run: mesh, data, checkpoint, steps, evaluation."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from hybrid_attn import checkpoint, config, files, trees
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.data import corpora, pipeline
from hybrid_attn.data.corpora import Corpus
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer, check_vocab, load_tokenizer
from hybrid_attn.model import Execution, execution_on
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.identity import data_identity
from hybrid_attn.parallel.mesh import AXES, axis_sizes, make_mesh
from hybrid_attn.parallel.processes import Peers
from hybrid_attn.train import console, init_from, sinks
from hybrid_attn.train.evaluation import Evaluations, check_names
from hybrid_attn.train.metrics import Metrics, peak_flops, set_aside
from hybrid_attn.train.resume import Range, check_arrays, check_function, check_rate, merge_skipped, text_of
from hybrid_attn.train.schedule import schedule
from hybrid_attn.train.step import TrainState, abstract_state, extras_of, init_state, make_steps, with_extras
from hybrid_attn.train.steps import Loop
from hybrid_attn.train.stop import Stop, hold

OLDER_STAGE = {"objective": "next_token"}  # of checkpoints that do not name the objective of their stage


def train(
    c: config.Config,
    workdir: str,
    peers: Peers | None = None,
    skip_steps: Sequence[Range] = (),
    allow_lr_jump: bool = False,
    execution: Execution | None = None,
) -> bool:
    """Trains `c` in `workdir` from its newest checkpoint, or from the start; False if a signal stopped it before the end.

    `peers` are those of `processes.start`, if several processes train; the workdir is then one that all of them see. The
    batches of `skip_steps`, numbered from 1, are passed over, and those that the checkpoint records. `execution` is that of
    every step and evaluation; by default it is that of the config on this platform.

    ValueError where the config, the data or a checkpoint does not fit, where the learning rate would jump, and where the model
    would compute another function; FloatingPointError when the loss or the parameters are not finite; BlockingIOError when
    another run is in `workdir`; OSError when a file cannot be written or read, after saving if possible.
    """
    check_names(c.evals.names)
    sinks.check_names(c.train.sinks)
    schedule(c.optim, c.pieces)  # ValueError for stages whose rates do not meet, before anything is written
    fit.check(c, dict(zip(AXES, axis_sizes(c.mesh, jax.device_count()), strict=True)))
    mesh, data = make_mesh(c.mesh), load_data(c)
    if peers:
        peers.agree(data_identity(data.corpora, data.tokenizer))
    of_run = execution or execution_on(jax.default_backend(), c.model, c.train)
    with hold(workdir), Stop(peers) as stop, jax.set_mesh(mesh), checkpoints_of(c, workdir) as checkpoints:
        state, start, recorded = first_state(c, data.identities, mesh, checkpoints)
        recorded["skipped_steps"] = merge_skipped(skip_steps, recorded["skipped_steps"], start, c.total_steps)
        history = past(c, checkpoints, start, recorded, allow_lr_jump)
        evaluations = Evaluations(c, of_run, mesh, data.tokenizer, data.corpora, workdir)
        evaluations.draw_questions()
        metrics = opened_metrics(c, of_run, mesh, data.stages, workdir, start)
        metrics.say(*history, *evaluations.left_out())
        if start == c.total_steps and evaluations.is_done(start):
            metrics.say(f"nothing left to train: {start} steps are done; add steps or a stage")
            close(c, workdir, metrics, evaluations)
            return True
        metrics.say(*write_config(Path(workdir), c, start))
        loop = Loop(
            c,
            make_steps(c, jax.default_backend(), execution),
            pipeline.batches(c, data.stages, mesh, start),
            checkpoints,
            metrics,
            stop,
            data_state=lambda step: data_state(c, data.identities, step, recorded),
            measure=lambda params: evaluations.measure(params, metrics, stop.is_requested),
            state=state,
            step=start,
            skipped=recorded["skipped_steps"],
            statistics_fns=make_steps(c, jax.default_backend(), execution, statistics=True),
        )
        loop.train()
        loop.save(wait=True)
        return finish(loop, workdir, evaluations)


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


def opened_metrics(
    c: config.Config, execution: Execution, mesh: Mesh, stages: Sequence[pipeline.MixedSequences], workdir: str, start: int
) -> Metrics:
    """The metrics of a run from step `start`, after its description is printed; `stages` are the sequences of each."""
    peak, source = peak_flops(jax.devices()[0], execution.dtype)
    peak_line = f"{peak * mesh.size:.4g} FLOP/s in {execution.dtype}, {source}; MFU is the share of it"
    renamed = set_aside(Path(workdir), start, 2 * c.train.checkpoint_every)
    metrics = Metrics(workdir, start, c, peak * mesh.size).open()
    metrics.say(*renamed, *console.description(c, execution, mesh, peak_line, stages, workdir, start))
    return metrics


def finish(loop: Loop, workdir: str, evaluations: Evaluations) -> bool:
    """Evaluates a run whose steps are saved; False if a signal stopped it. OSError where an error of a file ended the steps."""
    total, metrics, stop = loop.config.total_steps, loop.metrics, loop.stop
    if error := stop.failure:
        metrics.write_again()
        what = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        raise OSError(f"{what}; step {loop.step} is saved; mend that and run the same command again")
    if loop.step < total:
        metrics.say(f"stopped after step {loop.step}, which is saved; the same command goes on from there")
        return False
    interrupted = f"stopped in the evaluation; all {total} steps are saved, the same command goes on with it"
    try:
        stop.all_saved(interrupted)
        complete = loop.measure(loop.state.params)
        if not complete:
            metrics.say(interrupted)
        close(loop.config, workdir, metrics, evaluations if complete else None)
        return complete
    except KeyboardInterrupt:
        if not stop.saved:
            raise
        metrics.say(interrupted)
        return False


def close(c: config.Config, workdir: str, metrics: Metrics, evaluations: Evaluations | None) -> None:
    """Closes the metrics of a run, and prints what to do next where its `evaluations` are done."""
    if evaluations is not None:
        own_files = bool(corpora.locations(c.data, c.sources))
        metrics.say(*console.ending(workdir, metrics.step, evaluations.report_of(metrics.step), own_files))
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
    expected, of = extras_of(c).keys(), f"in the checkpoint of step {step}"
    added = [f"extras       {name}: not {of}; starts from its initial value" for name in sorted(expected - saved)]
    return added + [f"extras       {name}: {of}, and not in this config; left out" for name in sorted(saved - expected)]


def write_config(workdir: Path, c: config.Config, start: int) -> list[str]:
    """Writes config.json; a different one is renamed to config_until_STEP.json, the config of the steps up to `start`.

    At step 0 the different one belongs to a run without checkpoints: it gets a name of its own, which is the returned line.
    """
    if jax.process_index():
        return []
    path, text, notes = workdir / "config.json", json.dumps(config.to_dict(c), indent=1) + "\n", []
    older = path.with_name(f"config_until_{start}.json")
    if path.exists() and path.read_text(errors="replace") != text:
        if start == 0:
            notes.append(f"kept         the old config.json as {files.set_aside(path)}")
        elif not older.exists():
            path.rename(older)
    files.write_atomically(path, text)
    return notes


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
        check_arrays(newest[1], c, f"the checkpoint of step {newest[0]} in {checkpoints.directory}")
    step, state, saved = checkpoints.restore(abstract_state(c, mesh))
    state = with_extras(c, state)
    expected = data_state(c, identities, step, {})
    done = saved["stage_steps"]
    if done != expected["stage_steps"]:
        raise ValueError(other_steps(c, step, done, expected["stage_steps"]))
    if done and done[-1] < c.stages[len(done) - 1].steps:
        lines, stage = trees.differences(OLDER_STAGE | saved["stage"], expected["stage"], "  "), f"stages[{len(done) - 1}]"
        trees.check(
            not lines,
            f"the checkpoint of step {step} is in the middle of {stage}, and this config has other batches or another "
            "objective there (saved -> new):\n" + "\n".join(lines) + f"\nuse the saved values; or end that stage with "
            f"{stage}.steps={done[-1]}, and give the new values to a stage after it",
        )
    records = {key: value for key, value in saved.items() if key not in expected}
    return state, step, {"skipped_steps": []} | records  # older checkpoints have no skipped steps


def other_steps(c: config.Config, step: int, done: Sequence[int], expected: Sequence[int]) -> str:
    """The error for a checkpoint with `done` steps of each stage, where this config has `expected` steps at the same `step`."""
    last = len(done) - 1
    if last < len(c.stages) and all(stage.steps == n for stage, n in zip(c.stages[:last], done, strict=False)):
        flag = "--steps" if last == len(c.stages) - 1 else f"--config.stages[{last}].steps"
        return (
            f"the checkpoint of step {step} has done {done[last]} steps of stages[{last}], and this config has "
            f"{c.stages[last].steps} there; give {flag}={done[last]} or more"
        )
    needed = ", ".join(f"stages[{i}].steps={n}" for i, n in enumerate(done[:last]))
    return (
        f"the checkpoint of step {step} has done {list(done)} steps of each stage, and this config's stages would have done "
        f"{list(expected)}; a stage that is over keeps its steps; give {needed} and stages[{last}].steps={done[last]} or more"
    )


def data_state(c: config.Config, identities: Sequence[dict], step: int, records: dict) -> dict:
    """The data state after `step` steps: the steps of each stage begun, the identity of the last of them, and `records`."""
    done = [steps for steps in c.stage_steps(step) if steps]
    return {**records, "stage_steps": done, "stage": identities[len(done) - 1] if done else {}}
