"""The memory of a part without values is that of the part with values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsplit.adaptation.run_adapters import adapt, bare_parts, outlined
from fedsplit.estimation import tracing
from fedsplit.estimation.tracing import AllocationTracker, trace
from fedsplit.settings.documents import build


def test_the_tracker_follows_views_and_the_end_of_tensors() -> None:
    there = torch.zeros(100)
    with AllocationTracker(iter([there])) as tracker:
        view = there[:10]
        doubled = view * 2
        other = doubled.view(2, 5)
        assert tracker.live == 40
        del doubled
        assert tracker.live == 40  # the view keeps the memory
        del other
        assert (tracker.live, tracker.peak) == (0, 40)


@pytest.mark.parametrize("kernels", ["fused", "library"])
@pytest.mark.parametrize("kind", ["trunk", "top"])
def test_a_part_without_values_takes_what_the_part_takes(kernels: str, kind: str) -> None:
    """The same tracker counts real tensors."""
    config = build({"cut": "2:4", "kernels": kernels})
    (part,) = bare_parts(config, [kind])  # type: ignore[list-item]
    adapt(part, config)
    part.train()
    weights: Iterator[Tensor] = iter([*part.parameters(), *part.buffers()])
    with AllocationTracker(weights) as tracker:
        hidden = torch.randn(2, 24, 128).requires_grad_()
        ids = torch.randint(0, 1000, (2, 24))
        output = part(hidden, ids) if kind == "top" else part(hidden)
        kept = tracker.live
        output.backward(torch.ones_like(output))
    estimated = trace(outlined(config, kind), 2, 24, torch.float32, input_needs_gradient=True)  # type: ignore[arg-type]
    assert estimated.kept == pytest.approx(kept, rel=0.01)
    assert estimated.peak == pytest.approx(tracker.peak, rel=0.02)


def test_many_equal_blocks_are_extrapolated_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({"cut": "0:6"})
    quick = trace(outlined(config, "trunk"), 2, 16, torch.float32, input_needs_gradient=True)
    monkeypatch.setattr(tracing, "_are_equal", lambda blocks: False)
    assert trace(outlined(config, "trunk"), 2, 16, torch.float32, input_needs_gradient=True) == quick


@pytest.mark.parametrize("family", ["mixtral", "gemma3_text", "gpt_neox"])
def test_families_whose_code_asks_for_values_are_traced(family: str, tiny_models: dict[str, Path]) -> None:
    config = build({"model": str(tiny_models[family]), "cut": "1:2"})
    step = trace(outlined(config, "trunk"), 2, 16, torch.float32, input_needs_gradient=True)
    assert 0 < step.kept <= step.forward and step.needs_gradient
