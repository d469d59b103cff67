"""Compiles the step of the next stage in the background, while the last steps of the stage before it run."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from jax.sharding import Mesh, NamedSharding

from hybrid_attn.config import Config
from hybrid_attn.data.packed import fields_of
from hybrid_attn.parallel.mesh import TOKENS_BT
from hybrid_attn.train.step import abstract_on, begin_stage

LEAD = 32  # steps before the edge, or a tenth of the stage if that is more


class NextStep:
    """The compilation of the steps of later stages; `step_fns` and `meshes` are those of all stages.

    When it begins depends on the step alone, so that several processes begin at the same step. jax keeps the program with the
    jitted function, so that its first call finds it.
    """

    def __init__(self, config: Config, step_fns: Sequence[Callable], meshes: Sequence[Mesh]):
        self.config, self.step_fns, self.meshes = config, step_fns, meshes
        self.begun: dict[Callable, Future] = {}

    def begin(self, step: int, state) -> None:
        """Begins to compile the next stage's step if `step`, with its new `state`, is one of the last of its stage."""
        index, done = self.config.stage_at(step - 1)
        steps = self.config.stages[index].steps
        is_last, near = index + 1 == len(self.step_fns), steps - done - 1 <= max(LEAD, steps // 10)
        if is_last or not near or self.step_fns[index + 1] in (self.step_fns[index], *self.begun):
            return
        after, step_fn, mesh = self.config.at(index + 1), self.step_fns[index + 1], self.meshes[index + 1]
        shape = self.config.stages[index + 1].batch_at(0), after.seq_len
        sharding = NamedSharding(mesh, TOKENS_BT)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in fields_of(after).items()}
        with jax.set_mesh(mesh):
            begun = jax.eval_shape(functools.partial(begin_stage, self.config, index + 1), abstract_on(mesh, state))
        state = abstract_on(mesh, begun)
        executor = ThreadPoolExecutor(1, "compilation")
        self.begun[step_fn] = executor.submit(_compile, step_fn, mesh, state, batch)
        executor.shutdown(wait=False)

    def wait(self, step_fn: Callable) -> None:
        """Waits until the compilation of `step_fn` ends, if it was begun; its first call raises what went wrong."""
        if step_fn in self.begun:
            self.begun[step_fn].exception()


def _compile(step_fn: Callable, mesh: Mesh, state, batch: dict) -> None:
    with jax.set_mesh(mesh):  # the mesh in force is that of a thread
        step_fn.lower(state, batch).compile()
