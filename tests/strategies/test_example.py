"""Rounds worked by hand start from what is written down, and weigh clients as told."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from strategies.example import lora, one_round
from strategies.fedavg import FedAvg


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (6.0, 3.0)])
def test_the_layer_has_the_factors_and_the_scaling_asked_for(alpha: float | None, scaling: float) -> None:
    adapters = lora(A=[[1, 2, 3], [4, 5, 6]], B=[[1, 0]], alpha=alpha)
    a, b = adapters.factors("layer")
    assert a.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert b.tolist() == [[1.0, 0.0]]
    assert adapters.scaling("layer") == scaling


@pytest.mark.parametrize(("examples", "mean"), [(None, 3.0), ([3, 1], 2.0)])
def test_clients_count_by_their_examples(examples: list[int] | None, mean: float) -> None:
    start = lora(A=[[0]], B=[[0]])
    clients = [lora(A=[[value]], B=[[0]]) for value in (1, 5)]
    a, _ = one_round(FedAvg(), start, clients, examples).factors("layer")
    assert a.item() == mean


def test_the_page_on_strategies_shows_one_that_works() -> None:
    """The class to copy, and the round that is played with it."""
    code, session, *_ = re.findall(r"```python\n(.*?)```", Path("docs/strategies.md").read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    example = doctest.DocTestParser().get_doctest(session, names, "strategies.md", None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
