import numpy as np
import pytest

from hybrid_attn.data import rows as rows_module
from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.rows import Rows

LENGTHS = [3, 17, 4, 9, 3, 31, 5, 3]  # 75 tokens, each of them another number
TOTAL = sum(LENGTHS)
BYTE_LENGTHS = np.arange(TOTAL) * 7 % 5
SEQ_LENS = [1, 4, 15, 25, 32, 75, 100]


def documents(lengths=LENGTHS):
    ends = np.cumsum(lengths)
    return in_memory([np.arange(end - n, end).astype(np.uint16) for n, end in zip(lengths, ends, strict=True)], ends)


def make(seq_len, seed):
    return Rows(documents(), seq_len, seed, BYTE_LENGTHS)


def epoch_of(rows, epoch):
    """The rows of one epoch as one dict of arrays [rows, T]."""
    read = [rows[epoch * len(rows) + i] for i in range(len(rows))]
    return {name: np.stack([row[name] for row in read]) for name in read[0]}


def rows_by_hand(seq_len):
    """Tokens, targets, positions, segments and weights of reading order, one position at a time."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for start in range(0, TOTAL, seq_len):
        row, position, segment = [], 0, 0
        for t in range(start, start + seq_len):
            if t >= TOTAL:
                row.append((0, 0, 0, 0, 0))
                continue
            fresh = t == start or owner[t] != owner[t - 1]
            position, segment = (0, segment + 1) if fresh else (position + 1, segment)
            follows = t + 1 < TOTAL and owner[t + 1] == owner[t]
            row.append((t, t + 1 if follows else 0, position, segment, int(follows)))
        yield np.array(row).T


@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_reading_order_is_what_a_hand_would_cut(seq_len):
    rows = make(seq_len, None)
    by_hand = list(rows_by_hand(seq_len))
    assert len(by_hand) == len(rows) == len(list(rows))
    for row, wanted in zip(rows, by_hand, strict=True):
        for name, values in zip(("tokens", "targets", "positions", "segments", "weights"), wanted, strict=True):
            np.testing.assert_array_equal(row[name], values, err_msg=name)


def test_types_and_shapes():
    row = make(15, 0)[0]
    assert {name: (x.dtype.name, x.shape) for name, x in row.items()} == {
        "tokens": ("int32", (15,)),
        "targets": ("int32", (15,)),
        "positions": ("int32", (15,)),
        "segments": ("int32", (15,)),
        "weights": ("float32", (15,)),
        "bytes": ("float32", ()),
    }


@pytest.mark.parametrize("seq_len", SEQ_LENS)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_has_every_token_once_and_counts_every_target_once(seq_len, epoch):
    rows = make(seq_len, 7)
    read, counts = epoch_of(rows, epoch), rows.counts(epoch)
    real, counted = read["segments"] > 0, read["weights"] == 1
    assert sorted(read["tokens"][real]) == list(range(TOTAL))
    firsts = set(np.cumsum([0, *LENGTHS[:-1]]))
    assert sorted(read["targets"][counted]) == [t for t in range(TOTAL) if t not in firsts]
    np.testing.assert_array_equal(read["targets"][counted], read["tokens"][counted] + 1)
    assert read["weights"].sum() == counted.sum()
    assert counts["tokens"] + counts["padding"] == read["tokens"].size == counts["rows"] * seq_len
    assert counts["padding"] == np.sum(~real) < seq_len
    assert counts["cuts"] == read["weights"][:, -1].sum()
    assert counts["documents"] == len(LENGTHS)


def test_bytes_are_those_of_the_counted_targets():
    for row in make(15, 3):
        counted = row["targets"][row["weights"] == 1]
        assert row["bytes"] == sum(BYTE_LENGTHS[t] for t in counted)


def test_documents_stay_whole_and_only_their_order_is_shuffled():
    rows = make(4, 11)
    streams = [epoch_of(rows, epoch) for epoch in range(3)]
    streams = [read["tokens"][read["segments"] > 0] for read in streams]
    firsts = np.cumsum([0, *LENGTHS[:-1]])
    whole = {tuple(np.arange(first, first + n)) for first, n in zip(firsts, LENGTHS, strict=True)}
    orders = []
    for stream in streams:
        pieces = np.split(stream, np.flatnonzero(np.isin(stream, firsts)))[1:]
        assert {tuple(piece) for piece in pieces} == whole
        orders.append([piece[0] for piece in pieces])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(order != sorted(order) for order in orders)


def test_without_a_seed_every_epoch_is_in_reading_order():
    rows = make(15, None)
    for i in range(len(rows)):
        np.testing.assert_array_equal(rows[i]["tokens"], rows[i + len(rows)]["tokens"])


def test_a_row_depends_on_its_number_alone():
    straight = make(15, 5)
    wanted = [straight[i] for i in range(20)]
    jumping = make(15, 5)
    for i in np.random.default_rng(0).permutation(20):
        for name, values in jumping[int(i)].items():
            np.testing.assert_array_equal(values, wanted[i][name])


def test_another_seed_is_another_order():
    assert any((make(15, 5)[i]["tokens"] != make(15, 6)[i]["tokens"]).any() for i in range(5))


def test_the_shuffle_is_the_same_for_ever():
    assert rows_module._permutation(8, 5, 2).tolist() == [4, 2, 6, 7, 5, 0, 1, 3]


def test_many_short_documents_and_one_long_one_cost_no_token():
    lengths = [3] * 500 + [1000] + [3] * 500
    rows = Rows(documents(lengths), 128, 1, np.ones(sum(lengths)))
    read = epoch_of(rows, 0)
    assert sorted(read["tokens"][read["segments"] > 0]) == list(range(sum(lengths)))
    assert read["segments"].max() > 40
