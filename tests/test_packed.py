import itertools

import numpy as np
import pytest

from hybrid_attn.data import packed as packed_module
from hybrid_attn.data.documents import Documents, in_memory
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.synthetic import SyntheticSequences, Task

LENGTHS = [3, 17, 4, 9, 3, 31, 5, 3]  # 75 tokens, each of them another number
TOTAL = sum(LENGTHS)
BYTE_LENGTHS = np.arange(TOTAL) * 7 % 5
SEQ_LENS = [1, 4, 15, 25, 32, 75, 100]
PACKINGS = ["concat", "best_fit"]


def documents(lengths=LENGTHS):
    tokens = np.arange(sum(lengths)).astype(np.uint16)
    return in_memory(np.split(tokens, np.cumsum(lengths)[:-1]), range(len(lengths)))


def make(seq_len, seed, packing="concat"):
    return PackedSequences(documents(), seq_len, seed, BYTE_LENGTHS, packing)


def epoch_of(sequences, epoch):
    """The sequences of one epoch as one dict of arrays [sequences, T]."""
    read = [sequences[epoch * len(sequences) + i] for i in range(len(sequences))]
    return {name: np.stack([sequence[name] for sequence in read]) for name in read[0]}


def sequences_by_hand(seq_len):
    """Tokens, targets, positions, segments and weights of reading order, one position at a time."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for start in range(0, TOTAL, seq_len):
        sequence, position, segment = [], 0, 0
        for t in range(start, start + seq_len):
            if t >= TOTAL:
                sequence.append((0, 0, 0, 0, 0))
                continue
            fresh = t == start or owner[t] != owner[t - 1]
            position, segment = (0, segment + 1) if fresh else (position + 1, segment)
            follows = t + 1 < TOTAL and owner[t + 1] == owner[t]
            sequence.append((t, t + 1 if follows else 0, position, segment, int(follows)))
        yield np.array(sequence).T


@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_reading_order_is_what_a_hand_would_cut(seq_len):
    sequences = make(seq_len, None)
    by_hand = list(sequences_by_hand(seq_len))
    assert len(by_hand) == len(sequences) == len(list(sequences))
    for sequence, expected in zip(sequences, by_hand, strict=True):
        for name, values in zip(("tokens", "targets", "positions", "segments", "weights"), expected, strict=True):
            np.testing.assert_array_equal(sequence[name], values, err_msg=name)


def test_types_and_shapes():
    sequence = make(15, 0)[0]
    assert {name: (x.dtype.name, x.shape) for name, x in sequence.items()} == {
        "tokens": ("int32", (15,)),
        "targets": ("int32", (15,)),
        "positions": ("int32", (15,)),
        "segments": ("int32", (15,)),
        "weights": ("float32", (15,)),
        "bytes": ("float32", (15,)),
    }


@pytest.mark.parametrize("seq_len", SEQ_LENS)
@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_has_every_token_once_and_counts_every_target_once(seq_len, epoch, packing):
    sequences = make(seq_len, 7, packing)
    read, counts = epoch_of(sequences, epoch), sequences.counts(epoch)
    real, counted = read["segments"] > 0, read["weights"] == 1
    assert sorted(read["tokens"][real]) == list(range(TOTAL))
    firsts = set(np.cumsum([0, *LENGTHS[:-1]]))
    assert sorted(read["targets"][counted]) == [t for t in range(TOTAL) if t not in firsts]
    np.testing.assert_array_equal(read["targets"][counted], read["tokens"][counted] + 1)
    assert read["weights"].sum() == counted.sum()
    assert counts["tokens"] + counts["padding"] == read["tokens"].size == counts["sequences"] * seq_len
    assert counts["padding"] == np.sum(~real) and (packing == "best_fit" or counts["padding"] < seq_len)
    assert counts["documents"] == len(LENGTHS)
    owners = np.searchsorted(np.cumsum(LENGTHS), read["tokens"], side="right")
    sequences_of = [len({r for r in range(len(sequences)) if (real[r] & (owners[r] == i)).any()}) for i in range(len(LENGTHS))]
    assert counts["cuts"] == sum(n - 1 for n in sequences_of)
    assert counts["cut_documents"] == sum(n > 1 for n in sequences_of)
    if packing == "best_fit":
        assert [n > 1 for n in sequences_of] == [n > seq_len for n in LENGTHS]


def test_bytes_are_those_of_the_counted_targets():
    for sequence in make(15, 3):
        counted = sequence["targets"][sequence["weights"] == 1]
        assert sequence["bytes"][sequence["weights"] == 1].tolist() == [BYTE_LENGTHS[t] for t in counted]
        assert not sequence["bytes"][sequence["weights"] == 0].any()


def test_documents_are_cut_at_sequence_edges_only_and_documents_and_sequences_are_shuffled():
    sequences = make(4, 11)
    read = [epoch_of(sequences, epoch) for epoch in range(3)]
    epochs = [[tuple(t[s > 0]) for t, s in zip(x["tokens"], x["segments"], strict=True)] for x in read]
    firsts = set(np.cumsum([0, *LENGTHS[:-1]]).tolist())
    for sequence in itertools.chain(*epochs):
        for before, token in itertools.pairwise(sequence):
            assert token == before + 1 or (token in firsts and (before + 1 in firsts or before + 1 == TOTAL))
    for one, other in itertools.combinations(epochs, 2):
        assert one != other and set(one) != set(other)
    neighbours = [
        (sequence[-1], after[0]) for sequence, after in itertools.pairwise(epochs[0]) if sequence[-1] + 1 not in firsts
    ]
    assert np.mean([after == last + 1 for last, after in neighbours]) < 0.5


def test_without_a_seed_every_epoch_is_in_reading_order():
    sequences = make(15, None)
    for i in range(len(sequences)):
        np.testing.assert_array_equal(sequences[i]["tokens"], sequences[i + len(sequences)]["tokens"])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_sequence_depends_on_its_number_alone(packing):
    straight = make(15, 5, packing)
    expected = [straight[i] for i in range(20)]
    jumping = make(15, 5, packing)
    for i in np.random.default_rng(0).permutation(20):
        for name, values in jumping[int(i)].items():
            np.testing.assert_array_equal(values, expected[i][name])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seq_len", [1, 4, 15, 100])
def test_a_slice_of_a_sequence_is_read_alone_and_equals_that_part_of_the_sequence(monkeypatch, packing, seq_len):
    sequences = make(seq_len, 5, packing)
    read, original = [], Documents.read

    def watch(self, spans):
        spans = list(spans)
        read.append(sum(stop - start for _, start, stop in spans))
        return original(self, spans)

    monkeypatch.setattr(Documents, "read", watch)
    edges = sorted({0, 1, seq_len // 2, seq_len - 1, seq_len})
    slices = [(i, a, b) for i in range(2 * len(sequences)) for a in edges for b in edges if a < b]
    for (i, a, b), part in zip(slices, sequences.read(slices), strict=True):
        for name, values in sequences[i].items():
            np.testing.assert_array_equal(part[name], values[a:b], err_msg=f"{name} of sequence {i}[{a}:{b}]")
    assert read[0] <= sum(b - a + 1 for _, a, b in slices)  # all together, and one token after each slice


def test_best_fit_sequences_have_the_order_of_the_epoch():
    epochs = [epoch_of(make(15, 5, "best_fit"), epoch)["tokens"] for epoch in range(3)]
    sets = [sorted(map(tuple, epoch)) for epoch in epochs]
    assert sets[0] == sets[1] == sets[2]
    assert all((epochs[i] != epochs[j]).any() for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("expected, numbers", [(1, [0]), (3, [0, 2, 5]), (8, range(8)), (100, range(8))])
def test_a_sample_of_sequences_is_spread_over_the_epoch(expected, numbers):
    sequences = PackedSequences(documents([10] * 8), 10, None, np.ones(80))
    assert sequences.spread(expected) == list(numbers)


def test_another_seed_is_another_order():
    assert any((make(15, 5)[i]["tokens"] != make(15, 6)[i]["tokens"]).any() for i in range(5))


def test_the_shuffle_is_the_same_for_ever():
    assert packed_module._permutation(8, 5, 2).tolist() == [4, 2, 6, 7, 5, 0, 1, 3]


def test_many_short_documents_and_one_long_one_cost_no_token():
    lengths = [3] * 500 + [1000] + [3] * 500
    sequences = PackedSequences(documents(lengths), 128, 1, np.ones(sum(lengths)))
    read = epoch_of(sequences, 0)
    assert sorted(read["tokens"][read["segments"] > 0]) == list(range(sum(lengths)))
    assert read["segments"].max() > 40


@pytest.mark.parametrize("make", [
    lambda n: PackedSequences(in_memory([np.zeros(5, np.uint16)], [1]), n, 0, np.ones(258), "best_fit"),
    lambda n: SyntheticSequences(Task("copy", 1), n, 0),
])  # fmt: skip
def test_sequences_longer_than_positions_can_count_are_refused(make):
    with pytest.raises(ValueError, match="sequences of 100,000,000,000 tokens: use 1 to 2,147,483,647, because positions"):
        make(10**11)
