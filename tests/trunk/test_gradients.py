"""Sums of gradients that wait, by hand."""

from __future__ import annotations

import torch

from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.gradients import GradientSum, UnclippedGradient
from fedsplit.trunk.trainable import TrainableAdapter
from fedsplit.wire.packets import StepKey

ADAPTER = TrainableAdapter({"layer": torch.zeros(1)}, TrainSettings(), learns=True)


def gradients(value: float) -> dict[str, torch.Tensor]:
    return {"layer": torch.tensor([value])}


def test_a_sum_counts_the_parts_of_each_step_and_holds_each_snapshot_once() -> None:
    whole = GradientSum()
    snapshot = ADAPTER.snapshot
    equal_snapshot = {name: tensor.clone() for name, tensor in snapshot.items()}
    for micro, of_forward in enumerate((snapshot, snapshot, equal_snapshot)):
        whole.add(StepKey(1, 0, 0, micro=micro), 0.5, of_forward, gradients(micro + 1.0))
    whole.add(StepKey(1, 0, 1), 0.25, snapshot, gradients(10.0))
    assert [*whole.parts.values()] == [3, 1] and [*whole.rates.values()] == [0.5, 0.25]
    assert whole.gradients["layer"].tolist() == [16.0]
    assert len(whole.snapshots) == 2 and whole.snapshots[0] is snapshot and whole.snapshots[1] is equal_snapshot


def test_the_sum_with_a_further_gradient_leaves_the_sum_as_it_is() -> None:
    whole = GradientSum(gradients=gradients(1.0))
    assert whole.sum_with({**gradients(2.0), "head": torch.tensor([5.0])}).keys() == {"layer", "head"}
    assert whole.gradients["layer"].tolist() == [1.0] and whole.gradients.keys() == {"layer"}


def test_the_squared_norm_is_that_of_all_tensors_together() -> None:
    whole = GradientSum(gradients={"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    assert UnclippedGradient(ADAPTER, whole, StepKey(1, 0, 0), 1.0).squared == 25.0
