import gc
import threading
import time

import jax
import numpy as np
import pytest

from configs import base
from hybrid_attn import config
from hybrid_attn.data import documents, pipeline, tokenizer
from hybrid_attn.data.rows import Rows
from hybrid_attn.parallel import mesh as meshes

BYTES = tokenizer.load("bytes")
STAGES = [(3, 16, 8), (2, 32, 4), (4, 16, 8)]  # steps, seq_len, batch
MESHES = [(4, 1, 1, 2), (2, 2, 2, 1), (1, 2, 4, 1), (1, 1, 2, 4)]


@pytest.fixture
def corpus(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / f"{i:02}.txt").write_bytes(generator.integers(0, 256, 5 + 7 * i, np.uint8).tobytes())
    settings = config.Data((str(tmp_path / "*.txt"),), "bytes", holdout=0.2, seed=3, prefetch=2)
    return documents.load(settings, BYTES, heldout=False)


def make_config(stages=STAGES, seed=3, prefetch=2):
    c = base.get_config()
    c.stages = [{"steps": steps, "seq_len": seq_len, "batch": batch} for steps, seq_len, batch in stages]
    c.data.seed, c.data.prefetch = seed, prefetch
    return config.build(c)


def one_device():
    return meshes.make_mesh(config.Mesh(1, 1, 1, 1), jax.devices()[:1])


def run(c, corpus, start=0, mesh=None):
    """Steps and batches from `start` on, as NumPy arrays."""
    batches = pipeline.batches(c, corpus, BYTES, mesh or one_device(), start)
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


def test_each_step_takes_the_next_rows_of_its_stage(corpus):
    straight = run(make_config(), corpus)
    assert [step for step, _ in straight] == list(range(9))
    for index, (first, (steps, seq_len, batch)) in enumerate(zip((0, 3, 5), STAGES, strict=True)):
        rows = Rows(corpus, seq_len, pipeline._stage_seed(3, index), BYTES.byte_lengths)
        for name in ("tokens", "targets", "positions", "segments", "weights", "bytes"):
            read = np.concatenate([straight[first + i][1][name] for i in range(steps)])
            np.testing.assert_array_equal(read, np.stack([rows[i][name] for i in range(steps * batch)]))


def test_a_stage_long_enough_shows_every_token(corpus):
    stored = np.concatenate(corpus.read((i, 0, n) for i, n in enumerate(corpus.lengths)))
    num_rows = -(-len(stored) // 16)
    c = make_config([(num_rows, 16, 1)])
    read = run(c, corpus)
    tokens = np.concatenate([batch["tokens"][batch["segments"] > 0] for _, batch in read])
    np.testing.assert_array_equal(np.sort(tokens), np.sort(stored))


def test_resuming_at_any_step_goes_on_as_the_straight_run(corpus):
    c = make_config()
    straight = run(c, corpus)
    for start in range(c.total_steps + 1):
        assert_same(run(c, corpus, start), straight[start:])


def test_stages_and_seeds_have_row_orders_of_their_own(corpus):
    straight = dict(run(make_config(), corpus))
    other = dict(run(make_config(seed=4), corpus))
    assert (straight[0]["tokens"] != straight[5]["tokens"]).any()
    assert (straight[0]["tokens"] != other[0]["tokens"]).any()


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_holds_the_batch_of_one_device(corpus, sizes):
    c, mesh = make_config(), meshes.make_mesh(config.Mesh(*sizes))
    assert_same(run(c, corpus, mesh=mesh), run(c, corpus))
    data, fsdp, context, _ = sizes
    for step, batch in pipeline.batches(c, corpus, BYTES, mesh, 0):
        _, seq_len, rows = STAGES[c.stage_at(step)[0]]
        for name in ("tokens", "targets", "positions", "segments", "weights"):
            assert batch[name].sharding.spec == meshes.TOKENS_BT
            assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)
            shapes = {shard.data.shape for shard in batch[name].addressable_shards}
            assert shapes == {(rows // (data * fsdp), seq_len // context)}
        assert batch["bytes"].sharding.spec == meshes.ROWS_B and batch["bytes"].shape == (rows,)


def test_each_row_is_read_once_however_many_devices_hold_it(corpus, monkeypatch):
    read, read_row = [], Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda rows, i: read.append(i) or read_row(rows, i))
    run(make_config([(3, 16, 8)]), corpus, mesh=meshes.make_mesh(config.Mesh(2, 1, 2, 2)))
    assert read == list(range(24))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_it_reads_ahead_as_far_as_asked(corpus, monkeypatch, prefetch):
    read, read_row = [], Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda rows, i: read.append(i) or read_row(rows, i))
    batches = pipeline.batches(make_config([(20, 16, 1)], prefetch=prefetch), corpus, BYTES, one_device(), 0)
    next(batches)
    wait_until(lambda: len(read) == 1 + prefetch)
    time.sleep(0.05)
    assert read == list(range(1 + prefetch))
    batches.close()


def test_an_iterator_dropped_midway_leaves_no_thread(corpus):
    wait_until(lambda: not reading_ahead())
    batches = pipeline.batches(make_config([(50, 16, 1)], prefetch=5), corpus, BYTES, one_device(), 0)
    next(batches)
    assert reading_ahead()
    del batches
    gc.collect()
    wait_until(lambda: not reading_ahead())


def test_a_failure_while_reading_ahead_reaches_the_loop(corpus, monkeypatch):
    read_row = Rows.__getitem__

    def fail_at_two(rows, i):
        if i == 2:
            raise OSError("disk gone")
        return read_row(rows, i)

    monkeypatch.setattr(Rows, "__getitem__", fail_at_two)
    batches = pipeline.batches(make_config([(5, 16, 1)]), corpus, BYTES, one_device(), 0)
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


@pytest.mark.parametrize("num_rows", [5, 8, 10_000])
def test_held_out_rows_come_once_in_order_with_blank_rows_behind(corpus, num_rows):
    rows = Rows(corpus, 16, None, BYTES.byte_lengths)
    mesh = meshes.make_mesh(config.Mesh(2, 2, 2, 1))
    read = [jax.tree.map(np.asarray, batch) for batch in pipeline.heldout_batches(rows, num_rows, 4, mesh)]
    wanted = min(num_rows, len(rows))
    assert len(read) == -(-wanted // 4)
    for name in read[0]:
        joined = np.concatenate([batch[name] for batch in read])
        np.testing.assert_array_equal(joined[:wanted], np.stack([rows[i][name] for i in range(wanted)]))
        assert not joined[wanted:].any()


def test_batches_and_rows_that_do_not_split_name_what_would():
    mesh = meshes.make_mesh(config.Mesh(2, 2, 2, 1))
    good, bad_batch, small_batch, bad_len = (config.Stage(1, t, b) for t, b in [(16, 8), (16, 6), (16, 3), (15, 8)])
    pipeline.check_batch_shape([good], mesh)
    with pytest.raises(ValueError, match=r"stages\[1\]: batch 6 does not split over 4 data \* fsdp shards; use 4 or 8"):
        pipeline.check_batch_shape([good, bad_batch], mesh)
    with pytest.raises(ValueError, match="batch 3 does not split over 4 data . fsdp shards; use 4$"):
        pipeline.check_batch_shape([small_batch], mesh)
    with pytest.raises(ValueError, match=r"seq_len 15 does not split over 2 context shards; use 14 or 16"):
        pipeline.check_batch_shape([bad_len], mesh)
    with pytest.raises(ValueError, match="^batch 6 does not split over 4 data . fsdp shards; use 4 or 8"):
        next(pipeline.heldout_batches(None, 1, 6, mesh))
