"""Label smoothing against its formula."""

from __future__ import annotations

import pytest
import torch

from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.label_smoothing import LabelSmoothing
from fedsplit.objectives.objective import cross_entropy


def test_the_loss_is_the_papers_mixture() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, IGNORED, 2], [0, 3, 4]])
    logs = logits.log_softmax(-1)
    right = -logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = (0.7 * right - 0.3 * logs.mean(-1))[labels != IGNORED].mean()
    assert torch.allclose(LabelSmoothing(0.3)(logits, labels), expected)


def test_without_smoothing_it_is_cross_entropy_of_tokens_and_of_classes() -> None:
    generator = torch.Generator().manual_seed(2)
    for shape in ((4, 5), (2, 3, 5)):
        logits = torch.randn(shape, generator=generator)
        labels = torch.randint(5, shape[:-1], generator=generator)
        assert torch.equal(LabelSmoothing(0.0)(logits, labels), cross_entropy(logits, labels))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"smoothing is {smoothing}; it must be from 0 to below 1"):
        LabelSmoothing(smoothing)
