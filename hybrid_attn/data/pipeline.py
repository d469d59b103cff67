"""Global batches: the batch of a step is a pure function of the config and the step."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hybrid_attn import config
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.rows import Rows
from hybrid_attn.parallel.mesh import BATCH, ROWS_B, TOKENS_BT

Batch = dict[str, jax.Array]


def check_batch_shape(stages: Sequence[config.Stage], mesh: Mesh) -> None:
    """ValueError where the rows of a stage do not split over the batch axes of `mesh`, or its tokens over `context`."""
    for index, stage in enumerate(stages):
        _check_splits(f"stages[{index}]: batch", stage.batch, mesh, BATCH)
        _check_splits(f"stages[{index}]: seq_len", stage.seq_len, mesh, ("context",))


def batches(c: config.Config, documents: Documents, tokenizer, mesh: Mesh, start_step: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from `start_step` to the last step, `data.prefetch` batches read ahead.

    A batch has `tokens`, `targets`, `positions`, `segments` int32 [B, T], `weights` float32 [B, T] and `bytes`
    float32 [B], as `Rows` has them. Each process reads only the rows of its own devices.
    """
    rows = [
        Rows(documents, stage.seq_len, _stage_seed(c.data.seed, index), tokenizer.byte_lengths)
        for index, stage in enumerate(c.stages)
    ]

    def read(step: int) -> tuple[int, Batch]:
        index, step_of_stage = c.stage_at(step)
        batch = c.stages[index].batch
        first = step_of_stage * batch
        return step, _global_batch(lambda r: rows[index][first + r], batch, rows[index].seq_len, mesh)

    steps = grain.MapDataset.range(start_step, c.total_steps).map(read)
    # One thread: the tokens are in memory, and threads that cut rows would only wait for each other.
    ahead = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=c.data.prefetch))
    with contextlib.closing(iter(ahead)) as iterator:
        yield from iterator


def heldout_batches(rows: Rows, num_rows: int, batch: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches of the first `num_rows` rows, each row once; the last batch is filled up with rows of padding."""
    _check_splits("batch", batch, mesh, BATCH)
    num_rows = min(num_rows, len(rows))
    blank = {name: np.zeros_like(array) for name, array in rows[0].items()}
    for first in range(0, num_rows, batch):

        def read_row(r: int, first: int = first) -> dict[str, np.ndarray]:
            return rows[first + r] if first + r < num_rows else blank

        yield _global_batch(read_row, batch, rows.seq_len, mesh)


def _global_batch(read_row: Callable[[int], dict], batch: int, seq_len: int, mesh: Mesh) -> Batch:
    """The rows `read_row(0)` to `read_row(batch - 1)` as global arrays, of which each process reads its own."""
    row = functools.cache(read_row)

    def place(name: str) -> jax.Array:
        shape, spec = ((batch,), ROWS_B) if name == "bytes" else ((batch, seq_len), TOKENS_BT)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return np.stack([row(r)[name][index[1:]] for r in range(*index[0].indices(batch))])

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), shard)

    return {name: place(name) for name in ("tokens", "targets", "positions", "segments", "weights", "bytes")}


def _stage_seed(seed: int, stage: int) -> int:
    """A seed of its own for each stage, so that no stage repeats the row order of another."""
    return int(np.random.SeedSequence((seed, stage)).generate_state(1, np.uint64)[0])


def _check_splits(what: str, size: int, mesh: Mesh, axes: tuple[str, ...]) -> None:
    shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    if size % shards:
        below, above = size // shards * shards, -(-size // shards) * shards
        cure = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{what} {size} does not split over {shards} {' * '.join(axes)} shards; use {cure}")
