"""An estimate on a screen of 80 columns."""

from __future__ import annotations

import pytest
from small_estimates import estimated

from fedsplit.estimation.alternatives import alternatives_of
from fedsplit.estimation.cost_lines import assumptions, lines_of
from fedsplit.estimation.party_shapes import Workload


@pytest.mark.parametrize("settings", [{}, {"trunk__stages": "1:3:5", "objective": "distillation", "rounds": 100}])
def test_every_line_fits(settings: dict[str, object]) -> None:
    found = estimated(**settings)
    lines = lines_of(found, alternatives_of(found))
    assert [line for line in lines if len(line) > 80] == []
    assert "  limit: the client's line" in lines


def test_what_is_assumed_is_said() -> None:
    epochs = estimated(Workload(sequences=9, held_out=3), rounds=13, train__epochs=1, patience=2)
    said = "; ".join(assumptions(epochs))
    assert "9 training sequences" in said and "3 held-out" in said and "--patience" in said and "after round 12" in said
