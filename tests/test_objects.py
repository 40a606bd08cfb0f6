"""Objects in place of names."""

from __future__ import annotations

from fedsplit.objects import NOTHING, Objects
from strategies.fedavg import FedAvg


class WithStage(FedAvg):
    def stage(self) -> object:
        return object()


def test_a_strategy_has_a_stage_where_it_has_the_method() -> None:
    assert not NOTHING.has_stage
    assert not Objects(FedAvg()).has_stage
    assert Objects(WithStage()).has_stage
