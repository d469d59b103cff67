"""One model in several widths, with µP and without, trained for some steps on the data of its config."""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator

import jax
import optax

from hybrid_attn.config import Config, StageConfig
from hybrid_attn.data import pipeline
from hybrid_attn.model import execution_on
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train.loop import TrainingData
from hybrid_attn.train.objectives import objective_of
from hybrid_attn.train.optim import optimiser
from hybrid_attn.train.step import TrainState, init_state, loss_and_gradient
from hybrid_attn.trees import check

FORMS = {"standard": "standard parametrisation", "mup": "µP"}  # names of the two, and how tables and pictures call them
GROWING = ("num_heads", "num_kv_heads", "d_ff")  # fields of a model that keep their proportion to d_model


def at_width(c: Config, width: int, form: str) -> Config:
    """`c` with that d_model and all that keeps its proportion to it. The base of µP is that of `c`, or its own d_model.

    ValueError where a field would be no whole number.
    """
    fields = {}
    for name in GROWING:
        value = getattr(c.model, name)
        fields[name], rest = divmod(value * width, c.model.d_model)
        check(
            rest == 0,
            f"--widths: model.{name}={value} of model.d_model={c.model.d_model} would be {value * width / c.model.d_model:.4g} "
            f"at width {width}; use multiples of {c.model.d_model}",
        )
    base = c.model.mup_base_width or c.model.d_model
    model = dataclasses.replace(c.model, d_model=width, mup_base_width=base if form == "mup" else None, **fields)
    return dataclasses.replace(c, model=model)


@functools.cache
def make_step(c: StageConfig) -> Callable[[TrainState, dict, float], tuple[TrainState, jax.Array]]:
    """The step of a stage with its updates times a factor, and its loss: one program for all learning rates."""
    execution, objective, tx = execution_on(jax.default_backend(), c.model, c.train), objective_of(c), optimiser(c)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: dict, factor: float) -> tuple[TrainState, jax.Array]:
        (loss, _), grads = loss_and_gradient(c, execution, objective, state, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda update: factor * update, updates))
        return TrainState(state.step + 1, params, opt_state, state.extras), loss

    return step


def trained(c: Config, data: TrainingData, factor: float = 1.0) -> Iterator[tuple[TrainState, dict, jax.Array | None]]:
    """After each step of the first stage, at `factor` times its learning rate: the state, the batch, the loss.

    First comes the state before the first step, without a loss. A step donates the state before it.
    """
    c = dataclasses.replace(c, stages=c.stages[:1])
    mesh = make_mesh(c.at(0).mesh)
    fit.check(c, mesh.size)
    with jax.set_mesh(mesh):
        state, step = jax.jit(init_state, static_argnums=0)(c), make_step(c.at(0))
        for number, batch in pipeline.batches(c, data.stages, [mesh], 0):
            if number == 0:
                yield state, batch, None
            state, loss = step(state, batch, factor)
            yield state, batch, loss


def encoded(figure, suffix: str) -> bytes:
    """A figure of matplotlib as .png or .svg."""
    from matplotlib import rc_context  # takes a second; --help stays fast

    content = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "widths"}):  # small, and the same for the same numbers
        figure.savefig(content, format=suffix.removeprefix("."), dpi=120, metadata={"Date": None} if suffix == ".svg" else {})
    return content.getvalue()
