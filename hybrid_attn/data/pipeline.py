"""Mixtures of sources, and global batches: the batch of a step is a pure function of the config and the step."""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hybrid_attn import config
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.packed import ARRAYS, PackedSequences, fields_of, has_stored_reference, padding_arrays
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.parallel.fit import check_splits
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT
from hybrid_attn.trees import check

Batch = dict[str, jax.Array]
Slice = tuple[int, int, int]  # the number of a sequence, and the positions [start, stop) of it
SourceSequences = PackedSequences | SyntheticSequences
LONGEST_PERIOD = 100_000  # sequences of a mixture; weights of four digits repeat sooner


class Mixture:
    """Interleaves the packed sequences of several sources in exact shares. Each source keeps its own order.

    The weights are read as decimal fractions, as they are written. Their order within a period is Tijdeman's (The chairman
    assignment problem, 1980): after n sequences each source has its share of n, to within less than one sequence.
    """

    def __init__(self, weights: Mapping[str, float]):
        """`weights` are positive; ValueError where the order repeats only after more than `LONGEST_PERIOD` sequences."""
        self.names = tuple(sorted(weights))  # a config file does not order them
        exact = [Fraction(str(weights[name])) for name in self.names]
        shares = [weight / sum(exact) for weight in exact]
        self.period = math.lcm(*(share.denominator for share in shares))
        late = f"the mixture weights {dict(weights)} repeat only after {self.period:,} sequences"
        check(self.period <= LONGEST_PERIOD, f"{late}, and {LONGEST_PERIOD:,} are the most; round them to four digits")
        self._per_period = np.array([int(share * self.period) for share in shares])
        self._source = _chairman_assignment(self._per_period.tolist())
        self._before = np.empty_like(self._source)  # sequences of the same source earlier in the period
        for source, count in enumerate(self._per_period):
            self._before[self._source == source] = np.arange(count)

    def source_of(self, number: int) -> tuple[str, int]:
        """The source of sequence `number` of the mixture, and its number within that source."""
        periods, index = divmod(number, self.period)
        source = self._source[index]
        return self.names[source], int(periods * self._per_period[source] + self._before[index])

    def counts(self, number: int) -> dict[str, int]:
        """How many of the first `number` sequences come from each source."""
        periods, remainder = divmod(number, self.period)
        counts = periods * self._per_period + np.bincount(self._source[:remainder], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


def _chairman_assignment(counts: list[int]) -> np.ndarray:
    """A source for each of sum(counts) sequences. No source is ever a whole sequence away from its share."""
    period, margin = sum(counts), 2 * len(counts) - 2
    if not margin:
        return np.zeros(period, np.int64)
    order, taken = np.empty(period, np.int64), [0] * len(counts)
    for index in range(period):
        # How far each source is behind its share after this sequence, in units of sequences * period * margin. The sources that
        # are far enough behind are ready; of these, the one that would first fall too far behind is next.
        owed = [margin * ((index + 1) * count - period * x) for count, x in zip(counts, taken, strict=True)]
        ready = [i for i, x in enumerate(owed) if x >= period]
        order[index] = min(ready, key=lambda i: ((margin - 1) * period - owed[i]) // counts[i])
        taken[order[index]] += 1
    return order


@dataclasses.dataclass(eq=False)
class MixedSequences:
    """The sequences of one stage: those of its sources, in the order of its mixture."""

    mixture: Mixture
    sources: Mapping[str, SourceSequences]

    def read(self, slices: Sequence[Slice]) -> list[dict[str, np.ndarray]]:
        """Reads like `PackedSequences.read`, all slices of one source together."""
        origins = [self.mixture.source_of(number) for number, _, _ in slices]
        by_source = {name: [] for name, _ in origins}
        for (name, number), (_, start, stop) in zip(origins, slices, strict=True):
            by_source[name].append((number, start, stop))
        read = {name: iter(self.sources[name].read(slices)) for name, slices in by_source.items()}
        return [next(read[name]) for name, _ in origins]

    def epochs(self, number: int) -> dict[str, float]:
        """How often the first `number` sequences go through each source."""
        return {name: count / len(self.sources[name]) for name, count in self.mixture.counts(number).items()}


def stage_sequences(c: config.Config, documents: Mapping[str, Documents | Task], tokenizer) -> list[MixedSequences]:
    """The sequences of each stage, from the training `documents` of each source."""

    def of_source(stage: config.StageConfig, name: str) -> SourceSequences:
        seed = _source_seed(c.data.seed, stage.index, name)
        if c.data.sources[name].task is not None:
            return SyntheticSequences(documents[name], stage.seq_len, seed)
        selected = _documents_of(stage, name, documents[name])
        try:
            sizes = stage.seq_len, seed, tokenizer.byte_lengths, stage.data.packing
            return PackedSequences(selected, *sizes, references=has_stored_reference(stage))
        except ValueError as error:
            raise ValueError(f"data.sources.{name} with stages[{stage.index}].seq_len={stage.seq_len:,}: {error}") from error

    return [
        MixedSequences(Mixture(stage.mixture), {name: of_source(stage, name) for name in stage.mixture})
        for stage in c.each_stage
    ]


def _documents_of(stage: config.StageConfig, name: str, documents: Documents | Task) -> Documents | Task:
    """The `documents` of a source that are long enough for a stage; ValueError where none is."""
    least = stage.data.sources[name].min_length
    if isinstance(documents, Task) or (lengths := documents.joint_lengths()).min() >= least:
        return documents
    longest, field = lengths.max(), f"stages[{stage.index}].override.data.sources.{name}.min_length"
    check(longest >= least, f"{field}={least:,} leaves no document to train on; the longest has {longest:,} tokens")
    return documents.select(lengths >= least)


def identities(c: config.Config, documents: Mapping[str, Documents | Task], tokenizer) -> list[dict]:
    """Everything that determines the batches of each stage, and its objective: equal identities mean the same training."""
    fingerprints = {name: documents[name].fingerprint() for name in c.sources}

    def fingerprint(stage: config.StageConfig, name: str) -> str:
        selected = _documents_of(stage, name, documents[name])
        return fingerprints[name] if selected is documents[name] else selected.fingerprint()

    return [
        {
            "objective": stage.objective,
            "average_over": stage.average_over,
            "preference": None if stage.preference is None else dataclasses.asdict(stage.preference),
            "trainable": [] if stage.preference is None else list(stage.trainable),  # the reference has these parameters
            "batch": stage.batch,
            "batch_ramp": list(stage.batch_ramp),
            "batch_ramp_tokens": stage.batch_ramp_tokens,
            "seq_len": stage.seq_len,
            "mixture": dict(stage.mixture),
            "documents": {name: fingerprint(stage, name) for name in stage.mixture},
            "packing": stage.data.packing,
            "seed": c.data.seed,
            "tokenizer": tokenizer.hash,
        }
        for stage in c.each_stage
    ]


def batches(
    c: config.Config, stages: Sequence[MixedSequences], meshes: Sequence[Mesh], start_step: int
) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) from `start_step` to the last step and reads `data.prefetch` batches ahead.

    `stages` are the sequences of each stage, and `meshes` those that its batches are split over.

    A batch has `tokens`, `targets`, `positions`, `segments` int32 [B, T], `weights` and `bytes` float32 [B, T]; see
    `PackedSequences.read`, and `fields_of` for those of a stage. Each process reads only the slices that its own devices hold.
    """

    def read(step: int) -> tuple[int, Batch]:
        index, step_of_stage = c.stage_at(step)
        stage = c.stages[index]
        first = stage.sequences(step_of_stage)

        def read_slices(slices: list[Slice]) -> list[dict[str, np.ndarray]]:
            return stages[index].read([(first + b, start, stop) for b, start, stop in slices])

        shape = stage.batch_at(step_of_stage), stage.seq_len
        return step, _global_batch(read_slices, *shape, meshes[index], fields_of(c.at(index)))

    steps = grain.MapDataset.range(start_step, c.total_steps).map(read)
    options = grain.ReadOptions(num_threads=c.data.prefetch, prefetch_buffer_size=c.data.prefetch)
    with contextlib.closing(iter(steps.to_iter_dataset(options))) as iterator:
        yield from iterator


def heldout_batches(sequences: SourceSequences, count: int, batch: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches of `count` sequences spread over the first epoch, each once. Padding fills the last batch."""
    check_splits("batch", batch, mesh.shape, BATCH)
    numbers = sequences.spread(count)
    for first in range(0, len(numbers), batch):
        chosen = numbers[first : first + batch]

        def read_slices(slices: list[Slice], chosen: list[int] = chosen) -> list[dict[str, np.ndarray]]:
            read = iter(sequences.read([(chosen[b], start, stop) for b, start, stop in slices if b < len(chosen)]))
            return [next(read) if b < len(chosen) else padding_arrays(stop - start) for b, start, stop in slices]

        yield _global_batch(read_slices, batch, sequences.seq_len, mesh, ARRAYS)


def slices_of(devices: Iterable[jax.Device], batch: int, seq_len: int, mesh: Mesh) -> list[Slice]:
    """The slices of a batch that `devices` of `mesh` hold, each once even where several devices hold it."""
    blocks = NamedSharding(mesh, TOKENS_BT).devices_indices_map((batch, seq_len))
    return sorted({part for device in devices for part in _slices(blocks[device], batch, seq_len)})


def _slices(block: tuple[slice, slice], batch: int, seq_len: int) -> list[Slice]:
    """The slices of sequences in one device's block of a batch."""
    start, stop, _ = block[1].indices(seq_len)
    return [(b, start, stop) for b in range(*block[0].indices(batch))]


def _global_batch(
    read: Callable[[list[Slice]], list[dict]], batch: int, seq_len: int, mesh: Mesh, names: Iterable[str]
) -> Batch:
    """Sequences 0 to `batch` - 1 as global arrays of these names. Each process reads the slices of its own devices alone."""
    slices = slices_of(mesh.local_devices, batch, seq_len, mesh)
    arrays = dict(zip(slices, read(slices), strict=True))

    def sharded(name: str) -> jax.Array:
        def block_of(block: tuple[slice, slice]) -> np.ndarray:
            return np.stack([arrays[part][name] for part in _slices(block, batch, seq_len)])

        return jax.make_array_from_callback((batch, seq_len), NamedSharding(mesh, TOKENS_BT), block_of)

    return {name: sharded(name) for name in names}


def _source_seed(seed: int, stage: int, source: str) -> int:
    """A seed for each source of each stage: no two stages share an order, and other sources do not change it."""
    entropy = (seed, stage, zlib.crc32(source.encode()))
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
