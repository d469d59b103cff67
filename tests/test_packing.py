"""Best-fit packing equals a slow implementation, cuts no document that fits a sequence, and loses no token."""

import numpy as np
import pytest

from hybrid_attn.data import packed


def rooms_by_hand(lengths, seq_len):
    """The room left in each sequence by best-fit decreasing, one piece at a time."""
    rooms = []
    for piece in sorted((n % seq_len for n in lengths if n % seq_len), reverse=True):
        best = min((room for room in rooms if room >= piece), default=None)
        if best is None:
            rooms.append(seq_len - piece)
        else:
            rooms[rooms.index(best)] -= piece
    return sorted(rooms)


def spans_of(lengths, seq_len):
    """(document, first token, tokens) of every piece, sequence by sequence."""
    plan, sequences = packed.BestFit(lengths, seq_len, None), []
    for number in range(len(plan)):
        documents, firsts, _ = plan.spans(0, number)
        sizes = np.minimum(lengths[documents] - firsts, seq_len)
        sequences.append(list(zip(documents.tolist(), firsts.tolist(), sizes.tolist(), strict=True)))
    return sequences


def random_lengths(seed):
    rng = np.random.default_rng(seed)
    kind = seed % 4
    most = int(rng.integers(2, 60))
    if kind == 0:
        return rng.integers(1, most + 1, rng.integers(1, 200))
    if kind == 1:  # few different lengths, many documents of each
        return rng.choice(rng.integers(1, most + 1, 3), rng.integers(1, 300))
    if kind == 2:
        return np.minimum(rng.pareto(1.0, rng.integers(1, 100)) * 5 + 2, 500).astype(np.int64)
    return np.concatenate([rng.integers(1, 4, 100), rng.integers(1, 200, 5)])


@pytest.mark.parametrize("seed", range(24))
def test_sequences_are_those_of_best_fit_decreasing_with_every_token_once_and_no_short_document_cut(seed):
    lengths = random_lengths(seed)
    seq_len = int(np.random.default_rng(1000 + seed).integers(1, 50))
    sequences = spans_of(lengths, seq_len)
    taken = [np.zeros(n, int) for n in lengths]
    for sequence in sequences:
        assert 0 < sum(size for *_, size in sequence) <= seq_len
        for document, first, size in sequence:
            taken[document][first : first + size] += 1
            assert first % seq_len == 0 and (size == seq_len or first + size == lengths[document])
            assert lengths[document] > seq_len or size == lengths[document]
    assert all((x == 1).all() for x in taken)
    rooms = [seq_len - sum(size for *_, size in sequence) for sequence in sequences]
    assert sorted(rooms) == sorted([0] * int((lengths // seq_len).sum()) + rooms_by_hand(lengths, seq_len))


def test_a_hand_made_case():
    lengths = np.array([3, 25, 6, 7, 4, 10])  # sequences of 10: two of the 25, the 10, 7 + 3, 6 + 4, 5 of the 25
    sequences = spans_of(lengths, 10)
    assert sequences[:3] == [[(1, 0, 10)], [(1, 10, 10)], [(5, 0, 10)]]
    assert sorted(map(sorted, sequences[3:])) == [[(0, 0, 3), (3, 0, 7)], [(1, 20, 5)], [(2, 0, 6), (4, 0, 4)]]


def test_documents_that_all_fill_whole_sequences_leave_nothing_to_pack():
    assert spans_of(np.array([20, 10]), 10) == [[(0, 0, 10)], [(0, 10, 10)], [(1, 0, 10)]]


def test_the_plan_grows_with_the_different_lengths_and_not_with_the_documents():
    few, many = (list(packed.groups(np.full(64, n), 64)) for n in (100, 1_000_000))
    assert sum(sequences * per_sequence for _, sequences, per_sequence in many) == 64_000_000
    assert len(many) < 3 * len(few) + 64
