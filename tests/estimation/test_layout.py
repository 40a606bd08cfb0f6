"""Any cut is a sum over blocks."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from fedsplit.estimation.layout import layout_of, total
from fedsplit.estimation.party_memory import counts_of
from fedsplit.estimation.party_shapes import Parties
from fedsplit.model.flops import flops_of
from fedsplit.settings.documents import build


@pytest.mark.parametrize("cut", [(0, 6), (1, 5), (2, 4), (0, 3), (3, 6)])
def test_a_layout_under_one_cut_knows_every_cut(cut: tuple[int, int]) -> None:
    layout = layout_of(Parties(build({"cut": "2:5"})), rows=4)
    other = Parties(build({"cut": f"{cut[0]}:{cut[1]}"}))
    costs = layout.flops(cut)
    for part in (other.bottom, *other.stages, other.top):
        below = None if part.kind != "trunk" else cut[0] > 0
        assert astuple(costs[part.kind]) == pytest.approx(astuple(flops_of(part, 4, 128, below)))
    assert layout.client_weights(cut) == counts_of(other, ["bottom", "top"]).weights
    assert total(costs) == pytest.approx(total(layout.flops((1, 5))))
