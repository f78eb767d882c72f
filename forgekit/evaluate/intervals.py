"""How far chance alone could move a score: bootstrap intervals, of a score and of the difference of two on the same rows.

Rows are drawn anew, with replacement, as many as there are; the score of each draw is computed from the rows' counts, and
the middle 95 % of these scores are the interval (Efron 1979). Seeded, so a file gives the same interval on every machine.
"""

from typing import Any

import numpy

from .metrics import Counts, Metric

DRAWS, SEED, LEVEL = 2000, 3407, 0.95
BLOCK = 2**24  # numbers in one block of draws: 128 MB


def draw_samples(rows: int) -> Any:
    """Yield blocks of draws, [draws, rows]: how often each row stands in each."""
    generator = numpy.random.default_rng(SEED)
    size = max(1, BLOCK // rows)
    for start in range(0, DRAWS, size):
        yield generator.multinomial(rows, numpy.full(rows, 1 / rows), min(size, DRAWS - start)).astype(float)


def bound_score(metric: Metric, counts: Counts) -> tuple[float, float]:
    """Return the interval of a score.

    Args:
        counts: [rows, k], from `metric.count`.
    """
    scores = numpy.concatenate([metric.finish(draws @ counts) for draws in draw_samples(len(counts))])
    values = metric.finish_row(counts)
    return cut_tails(scores, values, 0.0, 1.0)


def bound_difference(metric: Metric, before: Counts, after: Counts) -> tuple[float, float]:
    """Return the interval of after - before, for counts of the same rows in the same order.

    Both are drawn together, so what makes a row hard for both models does not widen it.
    """
    scores = numpy.concatenate(
        [metric.finish(draws @ after) - metric.finish(draws @ before) for draws in draw_samples(len(before))]
    )
    return cut_tails(scores, metric.finish_row(after) - metric.finish_row(before), -1.0, 1.0)


def cut_tails(scores: Counts, values: Counts, lowest: float, highest: float) -> tuple[float, float]:
    """Return the bounds of the middle of drawn scores.

    Where all rows have one value no draw differs, and the bootstrap would be sure after two rows. There the bound is the
    exact one for events that were not seen in n rows (1 - (0.05 / 2) ** (1 / n), Clopper and Pearson 1934), each of which
    could have had the lowest or highest value.
    """
    tail = (1 - LEVEL) / 2
    value = float(values[0])
    if numpy.ptp(values) == 0 and lowest <= value <= highest:
        unseen = 1 - tail ** (1 / len(values))
        return value - unseen * (value - lowest), value + unseen * (highest - value)
    low, high = numpy.quantile(scores, [tail, 1 - tail])
    return float(low), float(high)


def compare_signs(before: list[float], after: list[float], higher: bool) -> tuple[int, int, float]:
    """Return how many rows became better, how many worse, and the p-value of the two-sided sign test between them."""
    from scipy.stats import binomtest

    signs = [(a > b) - (a < b) for b, a in zip(before, after, strict=True)]
    better, worse = signs.count(1 if higher else -1), signs.count(-1 if higher else 1)
    return better, worse, float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
