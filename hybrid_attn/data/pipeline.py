"""Global batches: the batch of a step is a pure function of the config and the step."""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hybrid_attn import config
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.mixture import Mixture
from hybrid_attn.data.packed import ARRAYS, PackedSequences, padding_arrays
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.parallel.fit import check_splits
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT

Batch = dict[str, jax.Array]
Slice = tuple[int, int, int]  # a row, and the positions [start, stop) of it


class MixedSequences:
    """The rows of one stage: rows of several sources in the order of their mixture."""

    def __init__(self, mixture: Mixture, rows: Mapping[str, PackedSequences | SyntheticSequences]):
        self.mixture = mixture
        self.rows = rows

    def read(self, slices: Sequence[Slice]) -> list[dict[str, np.ndarray]]:
        """As `PackedSequences.read`; what comes from one source is read together."""
        found = [self.mixture.source_of(r) for r, _, _ in slices]
        by_source = {name: [] for name, _ in found}
        for (name, row), (_, start, stop) in zip(found, slices, strict=True):
            by_source[name].append((row, start, stop))
        read = {name: iter(self.rows[name].read(wanted)) for name, wanted in by_source.items()}
        return [next(read[name]) for name, _ in found]

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows go through each source."""
        return {name: count / len(self.rows[name]) for name, count in self.mixture.counts(rows).items()}


def stage_sequences(c: config.Config, documents: Mapping[str, Documents | Task], tokenizer) -> list[MixedSequences]:
    """The rows of each stage, of the training `documents` of each source."""

    def rows(index: int, name: str) -> PackedSequences | SyntheticSequences:
        seed = _row_seed(c.data.seed, index, name)
        if c.data.sources[name].task is not None:
            return SyntheticSequences(documents[name], c.stages[index].seq_len, seed)
        return PackedSequences(documents[name], c.stages[index].seq_len, seed, tokenizer.byte_lengths, c.data.packing)

    weights = [c.weights(index) for index in range(len(c.stages))]
    return [MixedSequences(Mixture(names), {name: rows(index, name) for name in names}) for index, names in enumerate(weights)]


def identities(c: config.Config, documents: Mapping[str, Documents | Task], tokenizer) -> list[dict]:
    """For each stage, all that its batches follow from: two configs in which it is equal train on the same tokens."""
    prints = {name: documents[name].fingerprint() for name in c.sources}
    found = []
    for index, stage in enumerate(c.stages):
        weights = c.weights(index)
        found.append(
            {
                "batch": stage.batch,
                "seq_len": stage.seq_len,
                "mixture": weights,
                "documents": {name: prints[name] for name in weights},
                "packing": c.data.packing,
                "seed": c.data.seed,
                "tokenizer": tokenizer.hash,
            }
        )
    return found


def batches(c: config.Config, stages: Sequence[MixedSequences], mesh: Mesh, start_step: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from `start_step` to the last step, `data.prefetch` batches read ahead.

    A batch has `tokens`, `targets`, `positions`, `segments` int32 [B, T], `weights` and `bytes` float32 [B, T], as
    `PackedSequences.read` gives them. Each process reads only its own devices' slices of their rows.
    """

    def read(step: int) -> tuple[int, Batch]:
        index, step_of_stage = c.stage_at(step)
        stage = c.stages[index]
        first = step_of_stage * stage.batch

        def read_slices(slices: list[Slice]) -> list[dict[str, np.ndarray]]:
            return stages[index].read([(first + r, start, stop) for r, start, stop in slices])

        return step, _global_batch(read_slices, stage.batch, stage.seq_len, mesh)

    steps = grain.MapDataset.range(start_step, c.total_steps).map(read)
    options = grain.ReadOptions(num_threads=c.data.prefetch, prefetch_buffer_size=c.data.prefetch)
    with contextlib.closing(iter(steps.to_iter_dataset(options))) as iterator:
        yield from iterator


def heldout_batches(rows: PackedSequences | SyntheticSequences, num_rows: int, batch: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches of `num_rows` rows spread over the first epoch, each once; the last batch is filled up with rows of padding."""
    check_splits("batch", batch, mesh.shape, BATCH)
    numbers = rows.spread(num_rows)
    for first in range(0, len(numbers), batch):
        chosen = numbers[first : first + batch]

        def read(slices: list[Slice], chosen: list[int] = chosen) -> list[dict[str, np.ndarray]]:
            found = iter(rows.read([(chosen[r], start, stop) for r, start, stop in slices if r < len(chosen)]))
            return [next(found) if r < len(chosen) else padding_arrays(stop - start) for r, start, stop in slices]

        yield _global_batch(read, batch, rows.seq_len, mesh)


def slices_of(devices: Iterable[jax.Device], batch: int, seq_len: int, mesh: Mesh) -> list[Slice]:
    """What `devices` of `mesh` hold of a batch, each slice once however many of them hold it."""
    blocks = NamedSharding(mesh, TOKENS_BT).devices_indices_map((batch, seq_len))
    return sorted({part for device in devices for part in _slices(blocks[device], batch, seq_len)})


def _slices(block: tuple[slice, slice], batch: int, seq_len: int) -> list[Slice]:
    """The slices of rows in one device's block of a batch."""
    start, stop, _ = block[1].indices(seq_len)
    return [(r, start, stop) for r in range(*block[0].indices(batch))]


def _global_batch(read: Callable[[list[Slice]], list[dict]], batch: int, seq_len: int, mesh: Mesh) -> Batch:
    """What `read` gives of rows 0 to `batch` - 1 as global arrays, of which each process reads the slices of its devices."""
    slices = slices_of(mesh.local_devices, batch, seq_len, mesh)
    found = dict(zip(slices, read(slices), strict=True))

    def place(name: str) -> jax.Array:
        def block_of(block: tuple[slice, slice]) -> np.ndarray:
            return np.stack([found[part][name] for part in _slices(block, batch, seq_len)])

        return jax.make_array_from_callback((batch, seq_len), NamedSharding(mesh, TOKENS_BT), block_of)

    return {name: place(name) for name in ARRAYS}


def _row_seed(seed: int, stage: int, source: str) -> int:
    """A seed of its own for each source of each stage: no stage repeats the order of another, and sources come and go."""
    entropy = (seed, stage, zlib.crc32(source.encode()))
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
