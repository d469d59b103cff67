import gc
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import two_processes

from configs import base
from hybrid_attn import config
from hybrid_attn.data import documents, pipeline
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.parallel import mesh as meshes

BYTES = load_tokenizer("bytes")
STAGES = [(3, 16, 8), (2, 32, 4), (4, 16, 8)]  # steps, seq_len, batch
MESHES = [(4, 1, 1, 1, 2), (2, 2, 1, 2, 1), (1, 2, 2, 2, 1), (1, 1, 1, 2, 4)]


@pytest.fixture
def corpus(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / f"{i:02}.txt").write_bytes(generator.integers(1, 256, 5 + 7 * i, np.uint8).tobytes())
    return documents.load((str(tmp_path / "*.txt"),), BYTES)


def make_config(stages=STAGES, seed=3, prefetch=2, packing="concat"):
    c = base.get_config()
    c.stages = [
        {"steps": steps, "seq_len": seq_len, "batch": batch, "microbatches": 1, "mixture": {}}
        for steps, seq_len, batch in stages
    ]
    c.data.seed, c.data.prefetch, c.data.packing = seed, prefetch, packing
    return config.build(c)


def one_device():
    return meshes.make_mesh(config.Mesh(1, 1, 1, 1, 1, 1), jax.devices()[:1])


def start_batches(c, corpus, mesh, start=0):
    return pipeline.batches(c, pipeline.stage_sequences(c, {"text": corpus}, BYTES), [mesh] * len(c.stages), start)


def run(c, corpus, start=0, mesh=None):
    """Steps and batches from `start` on, as NumPy arrays."""
    batches = start_batches(c, corpus, mesh or one_device(), start)
    return [(step, jax.tree.map(np.asarray, batch)) for step, batch in batches]


def assert_same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (step, x), (_, y) in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=f"{name} of step {step}")


def reading_ahead():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_each_step_takes_the_next_sequences_of_its_stage(corpus):
    straight = run(make_config(), corpus)
    assert [step for step, _ in straight] == list(range(9))
    for index, (first, (steps, seq_len, batch)) in enumerate(zip((0, 3, 5), STAGES, strict=True)):
        sequences = PackedSequences(corpus, seq_len, pipeline._source_seed(3, index, "text"), BYTES.byte_lengths)
        for name in ("tokens", "targets", "positions", "segments", "weights", "bytes"):
            read = np.concatenate([straight[first + i][1][name] for i in range(steps)])
            np.testing.assert_array_equal(read, np.stack([sequences[i][name] for i in range(steps * batch)]))


def test_a_stage_long_enough_shows_every_token(corpus):
    num_sequences = -(-corpus.lengths.sum() // 16)
    c = make_config([(int(num_sequences), 16, 1)])
    read = run(c, corpus)
    tokens = np.concatenate([batch["tokens"][batch["segments"] > 0] for _, batch in read])
    stored = np.concatenate(corpus.read((i, 0, n) for i, n in enumerate(corpus.lengths)))
    np.testing.assert_array_equal(np.sort(tokens), np.sort(stored))


def test_resuming_at_any_step_goes_on_as_the_straight_run(corpus):
    c = make_config()
    straight = run(c, corpus)
    for start in range(c.total_steps + 1):
        assert_same(run(c, corpus, start), straight[start:])


def test_stages_and_seeds_have_sequence_orders_of_their_own(corpus):
    straight = dict(run(make_config(), corpus))
    other = dict(run(make_config(seed=4), corpus))
    assert (straight[0]["tokens"] != straight[5]["tokens"]).any()
    assert (straight[0]["tokens"] != other[0]["tokens"]).any()


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_holds_the_batch_of_one_device(corpus, sizes):
    c, mesh = make_config(), meshes.make_mesh(config.Mesh(1, *sizes))
    assert_same(run(c, corpus, mesh=mesh), run(c, corpus))
    data, fsdp, expert, context, _ = sizes
    for step, batch in start_batches(c, corpus, mesh):
        _, seq_len, sequences = STAGES[c.stage_at(step)[0]]
        for name in ("tokens", "targets", "positions", "segments", "weights", "bytes"):
            assert batch[name].sharding.spec == meshes.TOKENS_BT
            assert batch[name].dtype == (np.float32 if name in ("weights", "bytes") else np.int32)
            shapes = {shard.data.shape for shard in batch[name].addressable_shards}
            assert shapes == {(sequences // (data * fsdp * expert), seq_len // context)}


def watch(monkeypatch):
    """The slices that are read from now on."""
    read, original = [], PackedSequences.read
    monkeypatch.setattr(PackedSequences, "read", lambda sequences, slices: read.extend(slices) or original(sequences, slices))
    return read


def test_each_slice_of_a_sequence_is_read_once_however_many_devices_hold_it(corpus, monkeypatch):
    read = watch(monkeypatch)
    run(make_config([(3, 16, 8)]), corpus, mesh=meshes.make_mesh(config.Mesh(1, 2, 1, 1, 2, 2)))
    assert sorted(read) == [(sequence, start, start + 8) for sequence in range(24) for start in (0, 8)]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_are_prefetched_up_to_the_configured_number(corpus, monkeypatch, prefetch):
    read = watch(monkeypatch)
    batches = start_batches(make_config([(20, 16, 1)], prefetch=prefetch), corpus, one_device())
    next(batches)
    wait_until(lambda: len(read) == 1 + prefetch)
    time.sleep(0.05)
    assert sorted(sequence for sequence, _, _ in read) == list(range(1 + prefetch))
    batches.close()


def test_an_iterator_dropped_midway_leaves_no_thread(corpus):
    wait_until(lambda: not reading_ahead())
    batches = start_batches(make_config([(50, 16, 1)], prefetch=5), corpus, one_device())
    next(batches)
    assert reading_ahead()
    del batches
    gc.collect()
    wait_until(lambda: not reading_ahead())


def test_a_failure_while_reading_ahead_reaches_the_loop(corpus, monkeypatch):
    original = PackedSequences.read

    def fail_at_two(sequences, slices):
        if slices[0][0] == 2:
            raise OSError("disk gone")
        return original(sequences, slices)

    monkeypatch.setattr(PackedSequences, "read", fail_at_two)
    batches = start_batches(make_config([(5, 16, 1)]), corpus, one_device())
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


@pytest.mark.parametrize("num_sequences", [5, 8, 10_000])
def test_held_out_sequences_are_read_once_and_spread_and_padding_fills_the_last_batch(corpus, num_sequences):
    sequences = PackedSequences(corpus, 16, None, BYTES.byte_lengths)
    mesh = meshes.make_mesh(config.Mesh(1, 2, 2, 1, 2, 1))
    read = [jax.tree.map(np.asarray, batch) for batch in pipeline.heldout_batches(sequences, num_sequences, 4, mesh)]
    expected = min(num_sequences, len(sequences))
    assert len(read) == -(-expected // 4)
    for name in read[0]:
        joined = np.concatenate([batch[name] for batch in read])
        np.testing.assert_array_equal(
            joined[:expected], np.stack([sequences[i * len(sequences) // expected][name] for i in range(expected)])
        )
        assert not joined[expected:].any()


def test_a_held_out_batch_that_does_not_split_is_refused_with_a_size_that_does():
    with pytest.raises(ValueError, match="^batch 6 does not split over 4 slice . data . fsdp . expert shards; use 4 or 8$"):
        next(pipeline.heldout_batches(None, 1, 6, meshes.make_mesh(config.Mesh(1, 2, 2, 1, 2, 1))))


def random_case(seed):
    """A config of two to three sources, two stages and a packing of its own, and the documents of its sources."""
    rng = np.random.default_rng(seed)
    names = ["web", "books", "code"][: rng.integers(1, 4)]
    lengths = {name: rng.integers(3, int(rng.choice([12, 60, 200])), rng.integers(2, 40)) for name in names}
    corpora = {
        name: documents.in_memory([rng.integers(0, 256, n).astype(np.uint16) for n in sizes], range(len(sizes)))
        for name, sizes in lengths.items()
    }
    c = base.get_config()
    c.data.sources = {name: base.source() for name in names}
    c.data.seed, c.data.packing = int(rng.integers(10)), ["concat", "best_fit"][rng.integers(2)]
    c.stages = []
    for _ in range(2):
        chosen = names[: rng.integers(1, len(names) + 1)]
        mixture = {name: float(rng.integers(1, 8)) / 10 for name in chosen}
        sizes = {"steps": int(rng.integers(1, 5)), "seq_len": 8 * int(rng.integers(1, 6)), "batch": 8 * int(rng.integers(1, 3))}
        c.stages.append(sizes | {"microbatches": 1, "mixture": mixture})
    return rng, config.build(c), corpora


@pytest.mark.parametrize("part", range(10))
def test_hosts_read_together_the_same_batch_for_any_number_of_hosts_and_any_first_step(part):
    for seed in range(3 * part, 3 * part + 3):
        rng, c, corpora = random_case(seed)
        straight = pipeline.stage_sequences(c, corpora, BYTES)
        sizes = [2**i for i in rng.multinomial(3, [1 / 5] * 5)]
        mesh = meshes.make_mesh(config.Mesh(1, *map(int, sizes)))
        hosts, resumed_at = 2 ** int(rng.integers(4)), int(rng.integers(c.total_steps))
        each = np.split(np.array(jax.devices()), hosts)
        fresh = [pipeline.stage_sequences(c, corpora, BYTES) for _ in each]  # as new processes do
        for step in range(resumed_at, c.total_steps):
            index, step_of_stage = c.stage_at(step)
            stage = c.stages[index]
            first = step_of_stage * stage.batch
            expected = straight[index].read([(first + r, 0, stage.seq_len) for r in range(stage.batch)])
            seen = np.zeros((stage.batch, stage.seq_len), bool)
            for devices, sequences in zip(each, fresh, strict=True):
                slices = pipeline.slices_of(devices, stage.batch, stage.seq_len, mesh)
                covered = sum(stop - start for _, start, stop in slices)
                assert covered <= stage.batch * stage.seq_len * len(devices) // 8 * sizes[4]
                read = sequences[index].read([(first + r, start, stop) for r, start, stop in slices])
                for (r, start, stop), part_of_sequence in zip(slices, read, strict=True):
                    seen[r, start:stop] = True
                    for name, values in part_of_sequence.items():
                        np.testing.assert_array_equal(values, expected[r][name][start:stop], err_msg=f"seed {seed} {name}")
            assert seen.all()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resuming_in_the_middle_and_at_the_edges_of_epochs_and_stages_equals_the_straight_run(corpus, packing):
    few = corpus.select(corpus.lengths < 60)
    sequences = len(PackedSequences(few, 16, 0, BYTES.byte_lengths, packing))
    c = make_config([(2 * sequences + 3, 16, 1), (4, 32, 2)], packing=packing)
    straight = run(c, few)
    epochs = [straight[i * sequences : (i + 1) * sequences] for i in range(2)]
    first, second = (np.concatenate([batch["tokens"][batch["segments"] > 0] for _, batch in epoch]) for epoch in epochs)
    assert sorted(first.tolist()) == sorted(second.tolist()) and first.tolist() != second.tolist()
    for start in (
        sequences // 2,
        sequences - 1,
        sequences,
        sequences + 1,
        2 * sequences,
        2 * sequences + 2,
        2 * sequences + 3,
        2 * sequences + 4,
    ):
        assert_same(run(c, few, start), straight[start:])


def test_a_stage_takes_its_sequences_from_its_sources_by_their_weights():
    corpora = {name: documents.in_memory([np.full(500, i, np.uint16)], [i]) for i, name in enumerate(("a", "b", "c"))}
    c = base.get_config()
    c.data.sources = {name: base.source() for name in corpora}
    c.stages = [
        {"steps": 5, "seq_len": 10, "batch": 2, "microbatches": 1, "mixture": {"a": 0.7, "b": 0.3, "c": 0.0}},
        {"steps": 3, "seq_len": 20, "batch": 2, "microbatches": 1, "mixture": {"c": 2.0, "b": 1.0}},
    ]
    c = config.build(c)
    sequences = pipeline.stage_sequences(c, corpora, BYTES)
    read = [np.asarray(batch["tokens"])[:, 0] for _, batch in pipeline.batches(c, sequences, [one_device()] * len(c.stages), 0)]
    assert np.bincount(np.concatenate(read[:5])).tolist() == [7, 3]
    assert np.bincount(np.concatenate(read[5:])).tolist() == [0, 2, 4]
    assert sequences[0].epochs(10) == {"a": 7 / 50, "b": 3 / 50} and sequences[1].epochs(6) == {"b": 2 / 25, "c": 4 / 25}


def test_two_processes_hold_the_batches_of_one_and_read_no_more_than_their_part(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = [sys.executable, str(Path(__file__).parent / "two_processes.py"), address]
    quiet = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*program, str(i), str(tmp_path / f"{i}.npz")], env=quiet, **out) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    c, sequences = two_processes.config_and_sequences()
    held = [np.load(tmp_path / f"{i}.npz") for i in range(2)]
    for sizes in two_processes.MESHES:
        for step, batch in pipeline.batches(c, sequences, [one_device()] * len(c.stages), two_processes.START):
            for name, values in batch.items():
                parts = [part[f"{sizes}/{step}/{name}"] for part in held]
                owned = [~np.isnan(part) for part in parts]
                assert (owned[0] ^ owned[1]).all() and owned[0].sum() == owned[1].sum() == values.size / 2
                np.testing.assert_array_equal(np.where(owned[0], *parts), values, err_msg=f"{name} of step {step}")
            assert all(part[f"{sizes}/{step}/sum"] == batch["tokens"].sum() for part in held)
            assert all(part[f"{sizes}/{step}/read"] == values.size / 2 for part in held)
