"""One check of a contract."""

from __future__ import annotations

import pytest
import torch

from fedsplit.contracts.rules import BrokenError, require_equal, tried


def test_an_error_of_any_kind_is_a_fault_in_one_line() -> None:
    def fail() -> None:
        raise KeyError("no\nluck")

    def leave() -> None:
        raise SystemExit(3)

    faults = [check.fault for check in tried([("a", "", fail), ("b", "", leave), ("c", "", lambda: None)])]
    assert faults[0].startswith("KeyError: ") and "\n" not in faults[0]
    assert faults[1].startswith("SystemExit: 3") and faults[2] == ""


def test_differences_are_named_with_their_size() -> None:
    one, other = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([1.0, 2.5])}
    with pytest.raises(BrokenError, match=r"they differ in x, by 0.5"):
        require_equal(other, one, "they differ")
    with pytest.raises(BrokenError, match="one of them has no y"):
        require_equal({**one, "y": one["x"]}, one, "they differ")
    with pytest.raises(BrokenError, match=r"shapes \(1,\) and \(2,\)"):
        require_equal({"x": torch.ones(1)}, one, "they differ")
    require_equal({"x": torch.tensor([1.0, 2.0 + 1e-6])}, one, "they differ", exact=False)
