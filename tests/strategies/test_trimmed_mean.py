"""The coordinate-wise trimmed mean: by hand, and as Flower's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flower_rounds import assert_equal_rounds
from flwr.serverapp.strategy import FedTrimmedAvg
from rounds import Round, by_hand, start

from strategies.trimmed_mean import TrimmedMean


def test_the_extremes_are_cut_by_hand() -> None:
    """Of five, int(0.2 * 5) = 1 at each end. A: 1, 2, 3, 7, 90 gives (2 + 3 + 7) / 3 = 4; B: -9, 0, 0, 3, 4 gives 1."""
    pairs = [([[90.0]], [[0.0]]), ([[1.0]], [[0.0]]), ([[7.0]], [[-9.0]]), ([[3.0]], [[4.0]]), ([[2.0]], [[3.0]])]
    result = by_hand(TrimmedMean(0.2), pairs, [50, 1, 1, 1, 1], alpha=3.0)
    assert [tensor.item() for tensor in result.tensors.values()] == [4.0, 1.0]


def test_of_four_a_fifth_is_nobody() -> None:
    """int(0.2 * 4) = 0: the plain mean (90 + 1 + 7 + 2) / 4 = 25."""
    pairs = [([[a]], [[1.0]]) for a in (90.0, 1.0, 7.0, 2.0)]
    assert by_hand(TrimmedMean(0.2), pairs, [1, 2, 3, 4], alpha=3.0).tensors["l.lora_A.weight"].item() == 25.0


@pytest.mark.parametrize(("clients", "trim"), [(5, 0.2), (4, 0.2), (7, 0.45), (10, 0.3), (6, 0.0), (1, 0.4), (2, 0.49)])
@pytest.mark.parametrize("seed", range(2))
def test_several_rounds_are_flowers(clients, trim, seed) -> None:
    assert_equal_rounds(TrimmedMean(trim), FedTrimmedAvg(fraction_train=0.0, beta=trim), clients, seed)


def test_as_many_outliers_as_are_cut_move_no_entry_out_of_the_others_range() -> None:
    run = Round.begin(TrimmedMean(0.4), start())
    updates = run.train([2] * 5)
    honest = {n: torch.stack([u.adapters.tensors[n] for u in updates[2:]]) for n in run.adapters.tensors}
    for number in (0, 1):
        far = {n: t * 1e6 for n, t in updates[number].adapters.tensors.items()}
        updates[number] = replace(updates[number], adapters=run.adapters.with_tensors(far))
    for name, tensor in run.aggregate(updates).tensors.items():
        assert bool((honest[name].amin(0) <= tensor).all()) and bool((tensor <= honest[name].amax(0)).all())


@pytest.mark.parametrize("trim", [-0.1, 0.5, float("nan")])
def test_a_trim_of_half_or_more_is_refused(trim) -> None:
    with pytest.raises(ValueError, match="trim is"):
        TrimmedMean(trim)
