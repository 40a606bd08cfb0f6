"""Compares the points of a study over seeds: mean, standard deviation, and paired tests against a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WILCOXON_PAIRS = 6
"""Fewest pairs for Wilcoxon's test. Its smallest p for n pairs is 2 / 2**n, which is above 0.05 for fewer."""

FEW_PAIRS = 5
"""Number of pairs below which the comparison says that it can show little."""

ROUNDING = 1e-12
"""Deviation of differences, as a part of the largest value, up to which the differences count as equal.

A value in float64 is exact to 1e-16 of itself, so that equal differences deviate by that much, and t would be huge.
"""


@dataclass(frozen=True)
class Spread:
    """Values of one measure at one point, over seeds.

    Attributes:
        mean: Mean; None without a value.
        deviation: Standard deviation of the sample (n - 1); None for fewer than two values.
        count: Number of seeds.
    """

    mean: float | None
    deviation: float | None
    count: int


@dataclass(frozen=True)
class PairedTest:
    """Differences to the baseline, seed by seed.

    Attributes:
        difference: Mean difference; below 0 if the values are lower than the baseline's.
        pairs: Number of seeds that both points have.
        deviation: Standard deviation of the differences; None for one pair, 0 for differences that are equal but for
            rounding (see `ROUNDING`).
        t: Student's t of the differences; None for one pair, or if all differences are equal.
        t_p: Two-sided p of Student's t.
        wilcoxon_p: Two-sided p of Wilcoxon's signed-rank test; None for fewer than `WILCOXON_PAIRS` pairs.
    """

    difference: float
    pairs: int
    deviation: float | None = None
    t: float | None = None
    t_p: float | None = None
    wilcoxon_p: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Returns mean and standard deviation of some values.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        Spread(mean=2.0, deviation=1.0, count=3)
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values) if values else None
    return Spread(mean, deviation, len(values))


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedTest | None:
    """Compares values with those of the baseline that have the same seed.

    Data, batches and dropout are those of the seed, so that the difference within a seed varies less than the values.

    Args:
        values: Value by seed.
        baseline: Value of the baseline by seed.

    Returns:
        The test; None without a common seed.

    Example:
        >>> test = compare({0: 1.0, 1: 2.5, 2: 3.0}, {0: 1.5, 1: 3.5, 2: 3.5})
        >>> round(test.difference, 3), test.pairs, round(test.t, 3), round(test.t_p, 3)
        (-0.667, 3, -4.0, 0.057)
        >>> test.wilcoxon_p is None
        True
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    ours = [values[seed] for seed in seeds]
    theirs = [baseline[seed] for seed in seeds]
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    deviation = statistics.stdev(differences) if len(seeds) > 1 else None
    if deviation is not None and deviation <= ROUNDING * max(map(abs, [*ours, *theirs])):
        deviation = 0.0
    if not deviation or not math.isfinite(deviation):  # one pair, or equal differences: t is not defined
        return PairedTest(mean, len(seeds), deviation)

    from scipy import stats  # takes a second to import

    student = stats.ttest_rel(ours, theirs)
    wilcoxon_p = None
    if len(seeds) >= WILCOXON_PAIRS:
        wilcoxon_p = float(stats.wilcoxon(ours, theirs).pvalue)
    return PairedTest(mean, len(seeds), deviation, float(student.statistic), float(student.pvalue), wilcoxon_p)


def caveat(pairs: int, tests: int) -> str:
    """Returns what a reader must know about tests of so few pairs, in a sentence or two.

    Args:
        pairs: Most pairs of any test.
        tests: Number of tests.

    Example:
        >>> caveat(3, 2)
        '3 seeds show little: with so few pairs a test finds large and steady differences only. p is not corrected \
for the number of tests (2).'
    """
    seeds = "1 seed shows" if pairs == 1 else f"{pairs} seeds show"
    words = f"{seeds} little: with so few pairs a test finds large and steady differences only. "
    corrected = f"p is not corrected for the number of tests ({tests})."
    return (words if pairs < FEW_PAIRS else "") + corrected
