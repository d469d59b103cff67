"""Global batches: the batch of a step is a pure function of the config and the step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hybrid_attn import config
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.rows import ARRAYS, Rows, blank
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT

Batch = dict[str, jax.Array]
Slice = tuple[int, int, int]  # a row, and the positions [start, stop) of it


def check_batch_shape(stages: Sequence[config.Stage], mesh: Mesh) -> None:
    """ValueError where the rows of a stage do not split over the batch axes of `mesh`, or its tokens over `context`."""
    for index, stage in enumerate(stages):
        _check_splits(f"stages[{index}]: batch", stage.batch, mesh, BATCH)
        _check_splits(f"stages[{index}]: seq_len", stage.seq_len, mesh, ("context",))


def batches(c: config.Config, documents: Documents, tokenizer, mesh: Mesh, start_step: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from `start_step` to the last step, `data.prefetch` batches read ahead.

    A batch has `tokens`, `targets`, `positions`, `segments` int32 [B, T], `weights` and `bytes` float32 [B, T], as
    `Rows.read` gives them. Each process reads only its own devices' slices of their rows.
    """
    rows = [
        Rows(documents, stage.seq_len, _stage_seed(c.data.seed, index), tokenizer.byte_lengths)
        for index, stage in enumerate(c.stages)
    ]

    def read(step: int) -> tuple[int, Batch]:
        index, step_of_stage = c.stage_at(step)
        batch = c.stages[index].batch
        first = step_of_stage * batch

        def read_slices(slices: list[Slice]) -> list[dict[str, np.ndarray]]:
            return rows[index].read([(first + r, start, stop) for r, start, stop in slices])

        return step, _global_batch(read_slices, batch, rows[index].seq_len, mesh)

    steps = grain.MapDataset.range(start_step, c.total_steps).map(read)
    # One thread: the tokens are in memory, and threads that cut rows would only wait for each other.
    ahead = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=c.data.prefetch))
    with contextlib.closing(iter(ahead)) as iterator:
        yield from iterator


def heldout_batches(rows: Rows, num_rows: int, batch: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches of the first `num_rows` rows, each row once; the last batch is filled up with rows of padding."""
    _check_splits("batch", batch, mesh, BATCH)
    num_rows = min(num_rows, len(rows))
    for first in range(0, num_rows, batch):

        def read(slices: list[Slice], first: int = first) -> list[dict[str, np.ndarray]]:
            real = [(first + r, start, stop) for r, start, stop in slices if first + r < num_rows]
            found = iter(rows.read(real))
            return [next(found) if first + r < num_rows else blank(stop - start) for r, start, stop in slices]

        yield _global_batch(read, batch, rows.seq_len, mesh)


def _global_batch(read: Callable[[list[Slice]], list[dict]], batch: int, seq_len: int, mesh: Mesh) -> Batch:
    """The slices that `read` gives of rows 0 to `batch` - 1 as global arrays; each process reads those of its devices, once."""
    shape, sharding = (batch, seq_len), NamedSharding(mesh, TOKENS_BT)
    blocks = {_block(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    slices = sorted({(r, start, stop) for rows, start, stop in blocks for r in rows})
    found = dict(zip(slices, read(slices), strict=True))

    def place(name: str) -> jax.Array:
        def shard(index: tuple[slice, slice]) -> np.ndarray:
            rows, start, stop = _block(index, shape)
            return np.stack([found[r, start, stop][name] for r in rows])

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: place(name) for name in ARRAYS}


def _block(index: tuple[slice, slice], shape: tuple[int, int]) -> tuple[range, int, int]:
    """Rows, and first and last position, of a device's part of an array."""
    return range(*index[0].indices(shape[0])), *index[1].indices(shape[1])[:2]


def _stage_seed(seed: int, stage: int) -> int:
    """A seed of its own for each stage, so that no stage repeats the row order of another."""
    return int(np.random.SeedSequence((seed, stage)).generate_state(1, np.uint64)[0])


def _check_splits(what: str, size: int, mesh: Mesh, axes: tuple[str, ...]) -> None:
    shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    if size % shards:
        below, above = size // shards * shards, -(-size // shards) * shards
        cure = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{what} {size} does not split over {shards} {' * '.join(axes)} shards; use {cure}")
