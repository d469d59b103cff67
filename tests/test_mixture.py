"""After every sequence of a mixture each source has its share, and the sequences of a source come in order, without gaps."""

from fractions import Fraction

import numpy as np
import pytest

from hybrid_attn.data.pipeline import LONGEST_PERIOD, Mixture


def random_weights(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    digits = int(rng.integers(0, 3))
    weights = [max(round(float(x), digits), 10.0**-digits) for x in rng.pareto(1.0, n)]
    return {f"s{i}": weight for i, weight in enumerate(weights)}


@pytest.mark.parametrize("seed", range(30))
def test_at_every_prefix_each_source_is_less_than_a_sequence_from_its_share(seed):
    weights = random_weights(seed)
    try:
        mixed = Mixture(weights)
    except ValueError:
        assert sum(Fraction(str(x)) for x in weights.values()) * 100 > LONGEST_PERIOD
        return
    sequences = min(2 * mixed.period + 3, 3000)
    names = [mixed.source_of(i)[0] for i in range(sequences)]
    total = sum(Fraction(str(x)) for x in weights.values())
    for name, weight in weights.items():
        share = Fraction(str(weight)) / total
        got = np.cumsum([x == name for x in names])
        numerator, denominator = share.numerator, share.denominator
        assert (np.abs(got * denominator - np.arange(1, sequences + 1) * numerator) < denominator).all(), name
        assert [mixed.source_of(i)[1] for i in range(sequences) if names[i] == name] == list(range(got[-1]))
    for n in (0, 1, mixed.period - 1, mixed.period, sequences):
        if n <= sequences:
            assert mixed.counts(n) == {name: sum(mixed.source_of(i)[0] == name for i in range(n)) for name in weights}


def test_far_along_the_shares_are_still_exact():
    mixed = Mixture({"web": 0.7, "books": 0.2, "code": 0.1})
    n = 10**12
    assert mixed.period == 10
    assert mixed.counts(n) == {"web": 7 * n // 10, "books": 2 * n // 10, "code": n // 10}
    assert {mixed.source_of(n + i) for i in range(10)} == {
        *(("web", 7 * n // 10 + i) for i in range(7)),
        *(("books", 2 * n // 10 + i) for i in range(2)),
        ("code", n // 10),
    }


def test_weights_are_the_decimals_as_written_and_their_scale_and_order_do_not_matter():
    assert Mixture({"a": 0.1, "b": 0.2}).period == 3
    one, other = Mixture({"a": 0.1, "b": 0.2, "c": 1.2}), Mixture({"c": 12, "b": 2.0, "a": 1})
    assert [one.source_of(i) for i in range(40)] == [other.source_of(i) for i in range(40)]


def test_equal_sources_take_turns_and_a_single_one_has_all_sequences():
    assert sorted(Mixture({"a": 1, "b": 1, "c": 1}).source_of(i)[0] for i in range(3, 6)) == ["a", "b", "c"]
    assert [Mixture({"a": 0.3}).source_of(i) for i in (0, 1, 9)] == [("a", 0), ("a", 1), ("a", 9)]


def test_the_order_is_the_same_for_ever():
    assert "".join(Mixture({"a": 5, "b": 3, "c": 2}).source_of(i)[0] for i in range(10)) == "abacabacba"


def test_weights_that_repeat_too_rarely_are_refused():
    with pytest.raises(ValueError, match=r"repeat only after 10,000,000 sequences, and 100,000 are the most; round them"):
        Mixture({"a": 0.1234567, "b": 0.8765433})
