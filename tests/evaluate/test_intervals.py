"""Intervals: they agree with scipy's bootstrap and with exact ones, hold what they promise, and repeat."""

import numpy
import pytest
from scipy import stats

from forgekit.evaluate import intervals
from forgekit.evaluate.intervals import bound_difference, bound_score, compare_signs
from forgekit.evaluate.metrics import KNOWN

from .rows import make_row

EXACT, WER = KNOWN["exact_match"], KNOWN["wer"]


def count_shares(values: numpy.ndarray) -> numpy.ndarray:
    return numpy.stack([values, numpy.ones_like(values)], -1)


def test_a_mean_has_scipys_interval() -> None:
    values = numpy.random.default_rng(1).random(80)
    expected = stats.bootstrap(
        (values,), numpy.mean, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    assert bound_score(EXACT, count_shares(values)) == pytest.approx(tuple(expected), abs=0.006)


def test_a_rate_over_all_rows_has_scipys_interval() -> None:
    """Errors by words of all rows: no mean of rows."""
    rows = [make_row(i, "a b c d e f"[: 1 + 2 * (i % 6)], "a x c d"[: 1 + 2 * (i % 3)]) for i in range(40)]
    counts = WER.count(rows)

    def rate(errors: numpy.ndarray, words: numpy.ndarray, axis: int) -> numpy.ndarray:
        return errors.sum(axis) / words.sum(axis)

    expected = stats.bootstrap(tuple(counts.T), rate, paired=True, method="percentile", n_resamples=20_000, rng=2)
    assert bound_score(WER, counts) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)


def test_drawing_rows_together_is_narrower_than_apart() -> None:
    """A hard row is hard for both models; what they share must not widen the interval of their difference."""
    draw = numpy.random.default_rng(3)
    hard = draw.random(100)
    before, after = count_shares(hard), count_shares(hard + 0.05 + 0.02 * draw.standard_normal(100))
    low, high = bound_difference(EXACT, before, after)
    assert 0 < low < 0.05 < high and high - low < 0.02
    apart = bound_difference(EXACT, before, after[draw.permutation(100)])
    assert apart[1] - apart[0] > 5 * (high - low)


@pytest.mark.parametrize("rows", [2, 5, 6, 100])
def test_rows_that_all_agree_are_not_taken_for_certainty(rows: int) -> None:
    """The exact interval of Clopper and Pearson where the bootstrap would have no width."""
    right = count_shares(numpy.ones(rows))
    expected = stats.binomtest(rows, rows).proportion_ci(0.95)
    assert bound_score(EXACT, right) == pytest.approx((expected.low, 1.0))
    assert bound_score(EXACT, count_shares(numpy.zeros(rows))) == pytest.approx((0.0, 1 - expected.low))
    low, high = bound_difference(EXACT, count_shares(numpy.zeros(rows)), right)
    p = compare_signs([0.0] * rows, [1.0] * rows, True)[2]
    assert high == 1 and (low > 0) is (p < 0.05) is (
        rows >= 6
    )  # two right answers prove nothing, and both tests say so


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 sets of 60 rows from a known share, 95 % should hold it; fewer draws, as this is done 300 times."""
    monkeypatch.setattr(intervals, "DRAWS", 400)
    draw = numpy.random.default_rng(5)
    sets = [count_shares((draw.random(60) < 0.7).astype(float)) for _ in range(300)]
    held = sum(low <= 0.7 <= high for low, high in (bound_score(EXACT, counts) for counts in sets))
    assert 0.90 <= held / 300 <= 0.98


def test_the_same_rows_give_the_same_interval_whatever_was_drawn_before() -> None:
    counts = count_shares(numpy.random.default_rng(1).random(50))
    first = bound_score(EXACT, counts)
    numpy.random.random(10)
    assert bound_score(EXACT, counts) == first


def test_many_rows_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_shares(numpy.random.default_rng(1).random(50))
    whole = bound_score(EXACT, counts)
    monkeypatch.setattr(intervals, "BLOCK", 50 * 300)
    assert [len(block) for block in intervals.draw_samples(50)] == [300] * 6 + [200]
    assert bound_score(EXACT, counts) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("higher", [True, False])
def test_signs_are_counted_the_right_way_round(higher: bool) -> None:
    before, after = [0.0, 0.0, 0.0, 1.0, 0.5], [1.0, 1.0, 1.0, 0.0, 0.5]
    better, worse, p = compare_signs(before, after, higher)
    assert (better, worse) == ((3, 1) if higher else (1, 3))
    assert p == pytest.approx(stats.binomtest(3, 4).pvalue)
    assert compare_signs([1.0], [1.0], higher) == (0, 0, 1.0)
