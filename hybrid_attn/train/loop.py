"""The loop: mesh, restore, step, log, save, evaluate."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybrid_attn import checkpoint, config, files, trees
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.data import corpora, pipeline
from hybrid_attn.data.tokenizer import check_vocab, load_tokenizer
from hybrid_attn.model import run_on
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.identity import data_identity
from hybrid_attn.parallel.mesh import AXES, axis_sizes, make_mesh
from hybrid_attn.parallel.processes import Peers
from hybrid_attn.train.evaluation import Evaluations
from hybrid_attn.train.metrics import Metrics, peak_flops
from hybrid_attn.train.overview import ending
from hybrid_attn.train.progress import Progress, Timed
from hybrid_attn.train.records import set_aside
from hybrid_attn.train.resume import Range, changed_fields, check_rate, is_skipped, merge_skipped, text_of
from hybrid_attn.train.step import TrainState, abstract_state, init_state, make_step, skip_step
from hybrid_attn.train.stop import Stop, hold
from hybrid_attn.train.summary import summary


def train(
    c: config.Config,
    workdir: str,
    peers: Peers | None = None,
    skip_steps: Sequence[Range] = (),
    allow_lr_jump: bool = False,
) -> bool:
    """Trains `c` in `workdir` from its newest checkpoint, or from the start; False if a signal stopped it before the end.

    `peers` are those of `processes.start`, if there are several; the workdir is then one that all of them see. The batches of
    `skip_steps`, numbered from 1, are passed over, and those that the checkpoint records. ValueError where the config, the
    data or a checkpoint does not fit, and where the learning rate would jump; FloatingPointError when the loss or the
    parameters are not finite; BlockingIOError when another run is in `workdir`; OSError when a file cannot be written or read,
    after saving if possible.
    """
    fit.check(c, dict(zip(AXES, axis_sizes(c.mesh, jax.device_count()), strict=True)))
    mesh = make_mesh(c.mesh)
    tokenizer = load_tokenizer(c.data.tokenizer)
    check_vocab(tokenizer, c.model.vocab_size, c.data.tokenizer)
    loaded = corpora.load(c.data, c.sources, tokenizer)
    training = {name: corpus.training for name, corpus in loaded.items()}
    stages, identities = pipeline.stage_sequences(c, training, tokenizer), pipeline.identities(c, training, tokenizer)
    if peers:
        peers.agree(data_identity(loaded, tokenizer))
    run = run_on(jax.default_backend(), c.model, c.train)
    last_words = f"stopped in the evaluation; all {c.total_steps} steps are saved, the same command goes on with it"
    with hold(workdir), Stop(peers) as stop, jax.set_mesh(mesh):
        checkpoints = Checkpoints(Path(workdir) / "checkpoints", c.train.keep, c.train.checkpoint_every)
        try:
            new = checkpoints.latest() is None
            state, start, recorded = first_state(c, identities, mesh, checkpoints)
            recorded["skipped_steps"] = skipped = merge_skipped(skip_steps, recorded["skipped_steps"], start, c.total_steps)
            begins = "none found; starting at step 0" if new else restored(start, recorded)
            history = [f"checkpoint   {begins}", *past(c, checkpoints, start, recorded, allow_lr_jump)]
            evaluations = Evaluations(c, run, mesh, tokenizer, loaded, workdir, start)
            peak, found = peak_flops(jax.devices()[0], run.dtype)
            kept = set_aside(Path(workdir), start, 2 * c.train.checkpoint_every)
            metrics = Metrics(workdir, start, c.total_steps, peak * mesh.size)
            peak_line = f"{peak * mesh.size:.4g} FLOP/s in {run.dtype}, {found}; MFU is the share of it"
            lines = (*kept, *summary(c, run, mesh, peak_line, stages, workdir, start), *history, *evaluations.left_out())
            for line in lines:
                metrics.say(line)
            if start == c.total_steps and evaluations.is_done(start):
                metrics.say(f"nothing left to train: {start} steps are done; add steps or a stage")
                close(c, workdir, metrics, evaluations)
                return True
            for line in write_config(Path(workdir), c, start):
                metrics.say(line)
            batches = pipeline.batches(c, stages, mesh, start)

            def measure(params: dict) -> bool:
                return evaluations.measure(params, metrics, stop.asked)

            def data_of(step: int) -> dict:
                return data_state(c, identities, step, recorded)

            state, step = run_steps(
                c, data_of, make_step(c, run), state, start, batches, checkpoints, metrics, stop, measure, skipped
            )
            checkpoints.save(step, state, data_of(step), config.to_dict(c), wait=True)
            if stop.failure:
                metrics.write_the_rest()
                raise after_saving(stop.failure, step)
            if step < c.total_steps:
                metrics.say(f"stopped after step {step}, which is saved; the same command goes on from there")
                return False
            stop.all_saved(last_words)
            whole = measure(state.params)
            if not whole:
                metrics.say(last_words)
            close(c, workdir, metrics, evaluations if whole else None)
            return whole
        except KeyboardInterrupt:
            if not stop.saved:
                checkpoints.abandon()
                raise
            metrics.say(last_words)
            return False
        finally:
            checkpoints.close()


def close(c: config.Config, workdir: str, metrics: Metrics, evaluations: Evaluations | None) -> None:
    """Ends the metrics of a run, and says what can be done with it where its `evaluations` are done."""
    if evaluations is not None:
        own_files = bool(corpora.locations(c.data, c.sources))
        for line in ending(workdir, metrics.step, evaluations.report_of(metrics.step), own_files):
            metrics.say(line)
    metrics.close()


def restored(start: int, recorded: dict) -> str:
    """What the run begins with, of the checkpoint of step `start` and what its data state has `recorded`."""
    if start > 0:
        return f"step {start} found; going on from there"
    if "imported" in recorded:
        return f"step 0 found; restored parameters of {recorded['imported']}"
    return "step 0 found: a run that was stopped before its first step"


def past(c: config.Config, checkpoints: Checkpoints, start: int, recorded: dict, allow_lr_jump: bool) -> list[str]:
    """Lines for skipped steps, and for a config that is not that of the checkpoint of step `start`, if any.

    ValueError where the learning rate would jump; before the first step any rate will do. The config of a model that was
    imported is not one that it was trained with.
    """
    skipped = recorded["skipped_steps"]
    lines = [f"skipped      steps {text_of(skipped)}: their batches are passed over"] if skipped else []
    if start == 0 and ("imported" in recorded or checkpoints.latest() is None):
        return lines
    saved = config.renamed(checkpoint.read_config(checkpoints.directory, start))
    changed = changed_fields(saved, c)
    if changed:
        lines.append(f"config       differs from that of the checkpoint of step {start} (old -> new):")
        lines += [f"             {line}" for line in changed]
    return lines + (check_rate(saved, c, start, allow_lr_jump) if 0 < start < c.total_steps else [])


def write_config(workdir: Path, c: config.Config, start: int) -> list[str]:
    """Writes config.json; another one that is there becomes config_until_STEP.json, the config of the steps up to `start`.

    At step 0 it is of a run whose checkpoints are gone, or that was stopped before its first step: it is set aside, and a
    line says so.
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
    """The newest checkpoint's state, or a new one, the steps that it has behind it, and what else its data state records.

    `identities` are the stages' of `pipeline.identities`. ValueError where the config is of another model, or would have
    trained on other tokens in the stage that the checkpoint is in the middle of.
    """
    if checkpoints.latest() is None:
        return jax.jit(init_state, static_argnums=0)(c), 0, {"skipped_steps": []}
    checkpoints.check_config(config.to_dict(c))
    step, state, saved = checkpoints.restore(abstract_state(c, mesh))
    wanted = data_state(c, identities, step, {})
    done = saved["stage_steps"]
    if done != wanted["stage_steps"]:
        raise ValueError(other_steps(c, step, done, wanted["stage_steps"]))
    if done and done[-1] < c.stages[len(done) - 1].steps:
        lines = trees.differences(saved["stage"], wanted["stage"], "  ")
        if lines:
            stage = f"stages[{len(done) - 1}]"
            raise ValueError(
                f"the checkpoint of step {step} is in the middle of {stage}, and this config has other batches there "
                "(saved -> wanted):\n" + "\n".join(lines) + f"\nuse the saved values; or end that stage with {stage}.steps="
                f"{done[-1]}, and give the new values to a stage after it"
            )
    records = {key: value for key, value in saved.items() if key not in wanted}
    return state, step, {"skipped_steps": []} | records  # none in checkpoints of before such steps were recorded


def other_steps(c: config.Config, step: int, done: Sequence[int], wanted: Sequence[int]) -> str:
    """The error for stages that would have done `wanted` steps each by `step`, at which the checkpoint has `done` others."""
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
        f"{list(wanted)}; a stage that is over keeps its steps; give {needed} and stages[{last}].steps={done[last]} or more"
    )


def data_state(c: config.Config, identities: Sequence[dict], step: int, records: dict) -> dict:
    """Where the data stands after `step` steps: how many are done of each stage begun, what the last of those is, `records`."""
    done = []
    for stage in c.stages:
        if step:
            done.append(min(step, stage.steps))
            step -= done[-1]
    return {**records, "stage_steps": done, "stage": identities[len(done) - 1] if done else {}}


def run_steps(
    c, data_of, step_fn, state, start, batches: Iterator, checkpoints, metrics, stop, measure, skipped: Sequence[Range] = ()
) -> tuple[TrainState, int]:
    """Steps until the batches end or a signal asks to stop; metrics of a step are read after the next one is dispatched.

    `measure` evaluates parameters every `c.evals.every` steps, and says whether it came to its end: those of `start` too,
    because who resumes there may have been stopped before that. `data_of` is the data state after a step. The batches of
    `skipped` steps are read and not trained on.
    """
    pending, step, before, waited, shapes = None, start, time.perf_counter(), 0.0, set()
    progress = Progress(c, skipped)

    def report():
        nonlocal before, pending, waited
        if pending is None:
            return
        number, values, compiled = pending
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        now = time.perf_counter()
        check_finite(number, values, checkpoints)
        progress.add(Timed(values, now - before, waited, compiled, c.stage_at(number - 1)[0]))
        if number % c.train.log_every == 0 or number in (start + 1, c.total_steps):
            with stop.after_saving():
                metrics.log(number, *progress.line(number))
        metrics.advance(number)
        before, waited, pending = now, 0.0, None

    while step < c.total_steps and not stop.reached(step):
        if c.evals.every is not None and step and step % c.evals.every == 0:
            report()
            complete = False
            with stop.after_saving(together=True):
                complete = measure(state.params)
            if not complete:
                break
            before, waited = time.perf_counter(), 0.0
        clock = time.perf_counter()
        batch = None
        with stop.after_saving(together=True):
            _, batch = next(batches)
        if batch is None:
            break
        waited += time.perf_counter() - clock
        stage = c.stages[c.stage_at(step)[0]]
        shape = stage.batch, stage.seq_len, stage.microbatches
        step += 1
        if is_skipped(step, skipped):
            report()
            state = skip_step(state)
            stop.begun()
            with stop.after_saving():
                metrics.skip(step)
            metrics.advance(step)
            before, waited = time.perf_counter(), 0.0
        else:
            if shape not in shapes:
                report()  # before the new program is compiled, whose time is not that of the step before
            state, values = step_fn(state, batch, stage.microbatches)
            stop.begun()
            report()
            pending = step, values, shape not in shapes
            shapes.add(shape)
        if checkpoints.due(step) and step < c.total_steps:
            report()  # so that no state is saved whose loss nobody has looked at
            checkpoints.save(step, state, data_of(step), config.to_dict(c))
    report()
    return state, step


def after_saving(error: OSError, step: int) -> OSError:
    """The error that ends a run whose state is saved."""
    what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    return OSError(f"{what}; step {step} is saved; mend that and run the same command again")


def check_finite(step: int, values: dict, checkpoints: Checkpoints) -> None:
    """FloatingPointError if the loss, the learning rate or a norm (of the gradient, of the new parameters) is not finite."""
    names = ("loss", "grad_norm", "lr", "param_norm")
    bad = [f"{name} is {values[name]}" for name in names if not math.isfinite(values[name])]
    if not bad:
        return
    checkpoints.wait()  # for the one that is being written
    kept = checkpoints.latest()
    state = "no checkpoint was written yet" if kept is None else f"the checkpoint of step {kept} is kept"
    cure = f"lower optim.lr or raise optim.warmup_steps, or pass over the batch with --skip_steps={step}"
    if not math.isfinite(values["lr"]):
        cure = "mend the learning rate: optim.lr, optim.schedule, optim.final_lr_ratio"
    raise FloatingPointError(f"step {step}: {' and '.join(bad)}; {state}; {cure}")
