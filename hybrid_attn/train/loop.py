"""The loop: mesh, restore, step, log, save, evaluate."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybrid_attn import config, trees
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.data import corpora, pipeline, tokenizer
from hybrid_attn.model import flops, run_on
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import AXES, axis_sizes, make_mesh
from hybrid_attn.parallel.processes import Peers
from hybrid_attn.train.evaluation import Evaluations
from hybrid_attn.train.metrics import Metrics, peak_flops
from hybrid_attn.train.records import set_aside
from hybrid_attn.train.step import TrainState, abstract_state, init_state, make_step
from hybrid_attn.train.stop import Stop, hold
from hybrid_attn.train.summary import summary


def train(c: config.Config, workdir: str, peers: Peers | None = None) -> bool:
    """Trains `c` in `workdir` from its newest checkpoint, or from the start; False if a signal stopped it before the end.

    `peers` are those of `processes.start`, if there are several; the workdir is then one that all of them see.
    ValueError where the config, the data or a checkpoint does not fit; FloatingPointError when the loss is not finite;
    BlockingIOError when another run is in `workdir`; OSError when a file cannot be written or read, after saving if possible.
    """
    fit.check(c, dict(zip(AXES, axis_sizes(c.mesh, jax.device_count()), strict=True)))
    mesh = make_mesh(c.mesh)
    words = tokenizer.load(c.data.tokenizer)
    tokenizer.check_vocab(words, c.model.vocab_size, c.data.tokenizer)
    loaded = corpora.load(c.data, c.sources, words)
    training = {name: corpus.training for name, corpus in loaded.items()}
    stages, identities = pipeline.stage_rows(c, training, words), pipeline.identities(c, training, words)
    run = run_on(jax.default_backend(), c.model, c.train)
    last_words = f"stopped in the evaluation; all {c.total_steps} steps are saved, the same command goes on with it"
    with hold(workdir), Stop(peers) as stop, jax.set_mesh(mesh):
        checkpoints = Checkpoints(Path(workdir) / "checkpoints", c.train.keep, c.train.checkpoint_every)
        try:
            state, start = first_state(c, identities, mesh, checkpoints)
            evaluations = Evaluations(c, run, mesh, words, loaded, workdir, start)
            peak, found = peak_flops(jax.devices()[0], run.dtype)
            kept = set_aside(Path(workdir), start, 2 * c.train.checkpoint_every)
            metrics = Metrics(workdir, start, c.total_steps, peak * mesh.size)
            peak_line = f"{peak * mesh.size:.4g} FLOP/s in {run.dtype}, {found}; MFU is the share of it"
            for line in (*kept, *summary(c, run, mesh, peak_line, stages, workdir, start), *evaluations.left_out()):
                metrics.say(line)
            batches = pipeline.batches(c, stages, mesh, start)

            def measure(params: dict) -> bool:
                return evaluations.measure(params, metrics, stop.asked)

            state, step = run_steps(
                c, identities, make_step(c, run), state, start, batches, checkpoints, metrics, stop, measure
            )
            checkpoints.save(step, state, data_state(c, identities, step), config.to_dict(c), wait=True)
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
            metrics.close()
            return whole
        except KeyboardInterrupt:
            if not stop.saved:
                checkpoints.abandon()
                raise
            metrics.say(last_words)
            return False
        finally:
            checkpoints.close()


def first_state(c: config.Config, identities: Sequence[dict], mesh: Mesh, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The newest checkpoint's state, or a new one, and the steps that it has behind it.

    `identities` are the stages' of `pipeline.identities`. ValueError where the config is of another model, or would have
    trained on other tokens in the stage that the checkpoint is in the middle of.
    """
    if checkpoints.latest() is None:
        return jax.jit(init_state, static_argnums=0)(c), 0
    checkpoints.check_config(config.to_dict(c))
    step, state, saved = checkpoints.restore(abstract_state(c, mesh))
    wanted = data_state(c, identities, step)
    done = saved["stage_steps"]
    if done != wanted["stage_steps"]:
        raise ValueError(
            f"the checkpoint of step {step} has done {done} steps of each stage; the stages of this config "
            f"would have done {wanted['stage_steps']}; only the steps of the last stage begun can change"
        )
    if done and done[-1] < c.stages[len(done) - 1].steps:
        lines = trees.differences(saved["stage"], wanted["stage"], "  ")
        if lines:
            stage = f"stages[{len(done) - 1}]"
            raise ValueError(
                f"the checkpoint of step {step} is in the middle of {stage}, and this config has other batches there "
                "(saved -> wanted):\n" + "\n".join(lines) + f"\nuse the saved values; or end that stage with {stage}.steps="
                f"{done[-1]}, and give the new values to a stage after it"
            )
    return state, step


def data_state(c: config.Config, identities: Sequence[dict], step: int) -> dict:
    """Where the data stands after `step` steps: how many are done of each stage begun, and what the last of those is."""
    done = []
    for stage in c.stages:
        if step:
            done.append(min(step, stage.steps))
            step -= done[-1]
    return {"stage_steps": done, "stage": identities[len(done) - 1] if done else {}}


def run_steps(
    c, identities, step_fn, state, start, batches: Iterator, checkpoints, metrics, stop, measure
) -> tuple[TrainState, int]:
    """Steps until the batches end or a signal asks to stop; metrics of a step are read after the next one is dispatched.

    `measure` evaluates parameters every `c.evals.every` steps, and says whether it came to its end: those of `start` too,
    because who resumes there may have been stopped before that.
    """
    pending, step, waited, before = None, start, 0.0, time.perf_counter()

    def report():
        nonlocal before
        number, values, wait = pending
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        now = time.perf_counter()
        check_finite(number, values, checkpoints)
        if number % c.train.log_every == 0 or number in (start + 1, c.total_steps):
            stage = c.stages[c.stage_at(number - 1)[0]]
            tokens = stage.batch * stage.seq_len
            spent = tokens * flops.train_flops_per_token(c.model, stage.seq_len)
            with stop.after_saving():
                metrics.log(number, values | {"step_time": now - before, "data_wait": wait}, tokens, spent)
        metrics.advance(number)
        before = now

    while step < c.total_steps and not stop.reached(step):
        if c.evals.every is not None and step and step % c.evals.every == 0:
            if pending:
                report()
                pending = None
            complete = False
            with stop.after_saving(together=True):
                complete = measure(state.params)
            if not complete:
                break
            before = time.perf_counter()
        clock = time.perf_counter()
        batch = None
        with stop.after_saving(together=True):
            _, batch = next(batches)
        if batch is None:
            break
        waited = time.perf_counter() - clock
        state, values = step_fn(state, batch, c.stages[c.stage_at(step)[0]].microbatches)
        step += 1
        stop.begun()
        if pending:
            report()
        pending = step, values, waited
        if checkpoints.due(step) and step < c.total_steps:
            report()  # so that no state is saved whose loss nobody has looked at
            pending = None
            checkpoints.save(step, state, data_state(c, identities, step), config.to_dict(c))
    if pending:
        report()
    return state, step


def after_saving(error: OSError, step: int) -> OSError:
    """The error that ends a run whose state is saved."""
    what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    return OSError(f"{what}; step {step} is saved; mend that and run the same command again")


def check_finite(step: int, values: dict, checkpoints: Checkpoints) -> None:
    """FloatingPointError if the loss or the gradient of `step` is not a number."""
    bad = [f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        kept = checkpoints.latest()
        cure = "no checkpoint was written yet" if kept is None else f"the checkpoint of step {kept} is kept"
        raise FloatingPointError(f"step {step}: {' and '.join(bad)}; {cure}; lower optim.lr or raise optim.warmup_steps")
