"""Statistics over seeds."""

from __future__ import annotations

import math
import statistics

from fedsplit.studies.paired import compare, spread


def test_students_t_by_hand() -> None:
    """Differences -1, -2, -3: t = mean / (sd / sqrt(n)) = -2 / (1 / sqrt 3). By the closed form for 2 degrees of
    freedom, p = 1 - |t| / sqrt(2 + t**2)."""
    test = compare({0: 1.0, 1: 1.0, 2: 1.0, 9: 50.0}, {2: 4.0, 0: 2.0, 1: 3.0, 7: 1.0})
    assert test is not None and test.pairs == 3 and test.difference == -2 and test.deviation == 1
    t = -2 * math.sqrt(3)
    assert test.t is not None and math.isclose(test.t, t)
    assert test.t_p is not None and math.isclose(test.t_p, 1 - abs(t) / math.sqrt(2 + t * t))
    assert test.wilcoxon_p is None


def test_differences_that_differ_by_rounding_alone_are_equal() -> None:
    baseline = {0: 3.2, 1: 8.3, 2: 0.7}
    ours = {seed: value + 0.1 for seed, value in baseline.items()}
    assert len({ours[seed] - baseline[seed] for seed in baseline}) > 1, "rounding makes them differ"
    test = compare(ours, baseline)
    assert test is not None and test.deviation == 0 and test.t is None and test.t_p is None
    small = compare({seed: value + seed * 1e-9 for seed, value in baseline.items()}, baseline)
    assert small is not None and small.t is not None


def test_wilcoxon_from_six_pairs_on() -> None:
    """All of six differences have one sign: the smallest p that there is, 2 / 2**6."""
    baseline = {seed: 0.0 for seed in range(6)}
    test = compare({seed: seed + 1.0 for seed in range(6)}, baseline)
    assert test is not None and test.wilcoxon_p == 2 / 2**6


def test_nothing_is_tested_that_cannot_be() -> None:
    assert compare({0: 1.0}, {1: 1.0}) is None
    for values in ({0: 2.0}, {0: 2.0, 1: 2.0}):
        test = compare(values, dict.fromkeys(values, 1.0))
        assert test is not None and test.difference == 1 and test.t is None and test.t_p is None
    assert spread([2.0]).deviation is None
    assert spread([1.0, 4.0]).deviation == statistics.stdev([1, 4])
