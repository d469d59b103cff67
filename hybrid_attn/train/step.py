"""One training step: a pure function of state and batch."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Config, StageConfig
from hybrid_attn.model import Execution, execution_on, init, ranks
from hybrid_attn.parallel.mesh import TOKENS_BT
from hybrid_attn.train import average, edge, spikes, statistics, trainable
from hybrid_attn.train.objectives import objective_of
from hybrid_attn.train.objectives.objective import Extra, Objective
from hybrid_attn.train.optim import optimiser, without_biases
from hybrid_attn.train.schedule import schedule


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds: the arrays of its last step's stage, whose extras `extras_at` names."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    extras: dict = {}


Step = Callable[[TrainState, dict], tuple[TrainState, dict]]


def init_state(config: Config, params: dict | None = None, stage: int = 0) -> TrainState:
    """The state before the first step, of new parameters or `params`, on the mesh in force; every mesh has the same values.

    With `stage` it has the arrays of that stage, for programs that only run steps of that stage.
    """
    of_stage = config.at(stage)
    params = init(of_stage.model, jax.random.key(config.seed)) if params is None else params
    state = TrainState(jnp.int32(0), params, optimiser(of_stage).init(params))
    return state._replace(extras=_started(of_stage, extras_at(config, stage), params))


def extras_at(config: Config, stage: int) -> dict[str, Extra]:
    """The extras that a state has in a stage, by name: those of all stages, but for those that other stages have alone."""
    of_all = {name: extra for other in config.each_stage for name, extra in extras_of_stage(other).items()}
    return {name: x for name, x in of_all.items() if not x.of_stage} | extras_of_stage(config.at(stage))


def extras_of_stage(config: StageConfig) -> dict[str, Extra]:
    """The extras of the objective of a stage, and those that `optim` asks for."""
    extras = dict(objective_of(config).extras)
    if config.optim.ema_half_life is not None:
        extras[average.NAME] = average.moving_average(config.optim.ema_half_life)
    if config.optim.spike_factor is not None:
        extras[spikes.NAME] = spikes.HISTORY
    return extras


def with_extras(config: Config, stage: int, state: TrainState) -> TrainState:
    """The state in a stage with the initial arrays of the extras that it lacks."""
    missing = {name: extra for name, extra in extras_at(config, stage).items() if name not in state.extras}
    return _with_started(config.at(stage), missing, state)


def begin_stage(config: Config, stage: int, state: TrainState) -> TrainState:
    """The state before the first step of a stage, from that after the last step of the stage before it.

    It has the parameters of this stage, the extras that this stage has alone, and none that other stages have alone.
    """
    if edge.changes_arrays(config, stage):
        state = _converted(config, stage, state)
    names = {name for other in config.each_stage for name, extra in extras_of_stage(other).items() if extra.of_stage}
    if not names:
        return state
    extras = {name: x for name, x in state.extras.items() if name not in names}
    new = {name: extra for name, extra in extras_of_stage(config.at(stage)).items() if name in names}
    return _with_started(config.at(stage), new, state._replace(extras=extras))


def _converted(config: Config, stage: int, state: TrainState) -> TrainState:
    """The state with the parameters of a stage; extras that have other arrays then, such as an average, start anew."""
    params, opt_state = edge.arrays_of(config.at(stage), state.params, state.opt_state)
    expected = jax.eval_shape(functools.partial(_started, config.at(stage), extras_at(config, stage)), params)
    shapes, shapes_before = (jax.tree.map(jnp.shape, x) for x in (expected, state.extras))
    extras = {name: x for name, x in state.extras.items() if name in shapes and shapes[name] == shapes_before[name]}
    return with_extras(config, stage, state._replace(params=params, opt_state=opt_state, extras=extras))


def _with_started(config: StageConfig, new: dict[str, Extra], state: TrainState) -> TrainState:
    if not new:
        return state
    return state._replace(extras=state.extras | jax.jit(functools.partial(_started, config, new))(state.params))


def _started(config: StageConfig, extras: dict[str, Extra], params: dict) -> dict:
    trained = trainable.part(config, params)
    return {name: extra.start(trained if extra.of_stage else params) for name, extra in extras.items()}


def abstract_state(config: Config, mesh: Mesh, stage: int = 0) -> TrainState:
    """Shapes, dtypes and shardings of the state in a stage on `mesh`, which must be in force."""
    return abstract_on(mesh, jax.eval_shape(lambda: init_state(config, stage=stage)))


def abstract_on(mesh: Mesh, arrays):
    """Shapes and dtypes of arrays, and their shardings on `mesh`."""

    def abstract(x):
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(abstract, arrays)


def parts(batch: dict, number: int) -> dict:
    """The [B, T] arrays of a batch as [number, B / number, T]: every device splits the sequences that it holds."""

    def shard(x_BT):
        return x_BT.reshape(number, -1, x_BT.shape[1])

    split = jax.shard_map(shard, in_specs=TOKENS_BT, out_specs=P(None, *TOKENS_BT))
    return {name: split(jax.reshard(x_BT, TOKENS_BT)) for name, x_BT in batch.items()}


def make_step(config: StageConfig, execution: Execution) -> Step:
    """The jitted step of a stage, `step(state, batch) -> (state, metrics)`; it donates its state.

    More microbatches compute the same step in less memory. The norms are those of the gradient, which the parameters that the
    stage trains have, and of all new parameters, which an update that is not finite makes so as well; the norm of the update
    itself would keep the whole update in memory. With `optim.spike_factor` the state after a spike is `after_skipped_step`, and
    `consecutive_spikes` is a metric. With `execution.statistics` the metrics have those of `statistics.of_step` too, under
    "statistics". ValueError for an objective that is not in `OBJECTIVES`.
    """
    objective, tx, stage_extras = objective_of(config), optimiser(config), extras_of_stage(config)
    rate = schedule(config.optim, config.pieces)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=dict(execution.compiler_options))
    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        (loss, sums), grads = loss_and_gradient(config, execution, objective, state, batch)
        updates, params, opt_state = trainable.apply_gradient(tx, grads, state.opt_state, state.params)
        learned_grads = without_biases(config.model, grads)
        extras = {name: extra.update(state.extras[name], params, sums, state.step + 1) for name, extra in stage_extras.items()}
        new, measured = TrainState(state.step + 1, params, opt_state, state.extras | extras), {}
        metrics = {"loss": loss, **objective.metrics(sums, batch), "grad_norm": optax.tree.norm(learned_grads)}
        metrics["lr"] = rate(state.step)
        if config.optim.spike_factor is not None:
            is_spike, history = spikes.judge(config.optim, state.extras[spikes.NAME], metrics)
            new = jax.tree.map(functools.partial(jnp.where, is_spike), after_skipped_step(state), new)
            new = new._replace(extras=new.extras | {spikes.NAME: history})
            metrics["consecutive_spikes"] = history["consecutive"]
        if execution.statistics:
            trees = {"param_norm": new.params, "grad_norm": learned_grads, "update_norm": updates}
            measured["statistics"] = statistics.of_step(config.model, sums, trees)
            if config.train.rank_statistics:
                measured["statistics"] |= ranks.effective_ranks(config.model, new.params)
        return new, metrics | {"param_norm": optax.tree.norm(new.params)} | measured

    return step


def executions(config: Config, platform: str) -> list[Execution]:
    """The execution of each stage on a platform."""
    return [execution_on(platform, stage.model, stage.train) for stage in config.each_stage]


def make_steps(config: Config, of_stages: Sequence[Execution], *, statistics: bool = False) -> list[Step]:
    """The step of each stage with its execution; a program that stages share is compiled once.

    Steps with `statistics` are other programs, which change the state in the same way.
    """
    pairs = [(stage, x._replace(statistics=statistics)) for stage, x in zip(config.each_stage, of_stages, strict=True)]
    steps = {pair: make_step(*pair) for pair in pairs}
    return [steps[pair] for pair in pairs]


def loss_and_gradient(config: StageConfig, execution: Execution, objective: Objective, state: TrainState, batch: dict):
    """((loss, the objective's sums), gradient) of a batch, computed over its microbatches one after the other.

    The gradient of a parameter that the stage does not train is None. Statistics of the layers, if they are measured, have the
    microbatch as axis 0.
    """
    weight, microbatches = jnp.maximum(objective.weight(config, batch), 1.0), config.microbatches_of(len(batch["tokens"]))
    params = trainable.only(state.params, trainable.is_trained(config, state.params))
    extras = {name: state.extras[name] for name in objective.extras}

    def loss_of(params, part):
        total, sums = objective.loss(config, trainable.merged(params, state.params), extras, part, execution)
        loss = total / weight
        return (loss + sums["aux_loss"] / microbatches if "aux_loss" in sums else loss), sums

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if microbatches == 1:
        return gradient(params, batch)

    def of_part(part):
        (loss, sums), grads = gradient(params, part)
        sums, measured = statistics.taken_out(sums)
        return ((loss, sums), grads), measured

    def add(total, part):
        new, measured = of_part(part)
        return jax.tree.map(jnp.add, total, new), measured

    split = parts(batch, microbatches)
    (shapes, _), _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(jnp.zeros_like, shapes), jax.tree.map(jnp.zeros_like, params)
    ((loss, sums), grads), measured = jax.lax.scan(add, zeros, split)
    return (loss, sums | measured), grads


def after_skipped_step(state: TrainState) -> TrainState:
    """The state after a step that trains on nothing: the step and the schedule go on, everything else stays."""

    def advance(x):
        return x._replace(count=x.count + 1) if isinstance(x, optax.ScaleByScheduleState) else x

    opt_state = jax.tree.map(advance, state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
    return state._replace(step=state.step + 1, opt_state=opt_state)


@functools.partial(jax.jit, donate_argnums=0)
def forget_history(state: TrainState) -> TrainState:
    """The state without the losses and gradient norms of the last steps, of which those of another stage may be spikes."""
    history = state.extras[spikes.NAME]
    unknown = {name: jnp.full_like(history[name], jnp.nan) for name in spikes.VALUES}
    return state._replace(extras=state.extras | {spikes.NAME: history | unknown})


@functools.partial(jax.jit, donate_argnums=0)
def skip_step(state: TrainState) -> TrainState:
    """`after_skipped_step`, with no consecutive spikes before the next step."""
    state = after_skipped_step(state)
    if spikes.NAME not in state.extras:
        return state
    history = state.extras[spikes.NAME] | {"consecutive": jnp.int32(0)}
    return state._replace(extras=state.extras | {spikes.NAME: history})
