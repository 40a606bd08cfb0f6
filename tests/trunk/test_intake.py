"""What is taken in, and who is refused of several that are served as one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsplit.model.facts import NO_LIMIT
from fedsplit.trunk.intake import Intake, check_rate, each, refusal
from fedsplit.wire.casting import EXACT
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import SpoiledStep, SpoiledTogether, UnboundedStep

PART: Any = SimpleNamespace(
    config=SimpleNamespace(hidden_size=4, max_position_embeddings=8), dtype=torch.float32, experts=2
)
INTAKE = Intake(PART, EXACT, torch.device("cpu"))


def packet(client: int = 0, **tensors: torch.Tensor) -> Packet:
    return Packet(StepKey(1, client, 0), {name: EXACT.encode(tensor) for name, tensor in tensors.items()})


def test_what_fits_is_taken_in_to_the_bit() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    whole = packet(hidden=hidden, mask=mask, gradient=hidden, routers=torch.ones(5))
    assert torch.equal(INTAKE.hidden(whole), hidden)
    assert torch.equal(INTAKE.mask(whole, hidden), mask)
    assert torch.equal(INTAKE.gradient(whole, hidden), hidden)
    assert INTAKE.sums(whole) is not None
    assert torch.equal(INTAKE.gradient_by_sums(packet(routers=torch.ones(2)), has_sums=True), torch.ones(2))


UNASKED = torch.ones(2)
"""A gradient that would fit, of a step that has no sums."""


@pytest.mark.parametrize("gradient", [UNASKED, torch.tensor([1.0, torch.nan]), torch.ones(2).long()], ids=str)
def test_gradients_by_sums_that_do_not_fit_are_refused(gradient: torch.Tensor) -> None:
    with pytest.raises(SpoiledStep, match="not 2 finite numbers"):
        INTAKE.gradient_by_sums(
            packet(routers=gradient), has_sums=bool(gradient.dtype != torch.float32 or gradient[1] != 1)
        )


def test_float32_is_taken_in_beside_the_narrow_type_of_the_part_and_nothing_wider() -> None:
    """Norms that learn are float32, and in a mixture of experts so are the hidden states behind them."""
    narrow: Any = SimpleNamespace(**{**vars(PART), "dtype": torch.bfloat16})
    intake = Intake(narrow, EXACT, torch.device("cpu"))
    for kind in (torch.bfloat16, torch.float32):
        tensor = torch.ones(2, 3, 4, dtype=kind)
        assert intake.hidden(packet(hidden=tensor)).dtype == intake.gradient(packet(gradient=tensor), tensor).dtype
        assert intake.hidden(packet(hidden=tensor)).dtype == kind
    for kind in (torch.float16, torch.float64):
        tensor = torch.ones(2, 3, 4, dtype=kind)
        with pytest.raises(SpoiledStep, match="hidden states of type") as caught:
            intake.hidden(packet(hidden=tensor))
        assert not isinstance(caught.value, UnboundedStep)
        with pytest.raises(SpoiledStep, match="gradient of type"):
            intake.gradient(packet(gradient=tensor), tensor)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpoiledStep, match=r"client 0, step 0.* sent no hidden"):
        INTAKE.hidden(packet(mask=torch.ones(1)))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_nobody_gets_more_than_the_learning_rate(rate: float) -> None:
    with pytest.raises(SpoiledStep, match="of the learning rate, not a share from 0 to 1"):
        check_rate(Packet(StepKey(1, 0, 0), rate=rate))


def test_of_several_all_that_are_wrong_are_named_at_once() -> None:
    packets = [packet(client, hidden=torch.ones(1, 1, 4 if client % 2 else 3)) for client in range(5)]
    with pytest.raises(SpoiledTogether) as caught:
        each(packets, INTAKE.hidden)
    assert [key.client for key in caught.value.refused] == [0, 2, 4]
    assert all(str(key) in str(reason) for key, reason in caught.value.refused.items())
    with pytest.raises(SpoiledStep, match="client 0"):
        each(packets[:1], INTAKE.hidden)
    assert list(each(packets[1:2], INTAKE.hidden)) == [packets[1].key]
    assert isinstance(refusal(caught.value.refused, 5), SpoiledTogether)


def test_a_model_without_positions_takes_in_any_length() -> None:
    """As a state-space model, whose configuration has no longest sequence."""
    part: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=4), dtype=torch.float32, experts=0)
    intake = Intake(part, EXACT, torch.device("cpu"))
    intake.check_shape(StepKey(1, 0, 0), (1, 1_000_000, 4))
    with pytest.raises(SpoiledStep, match=f"beyond the model's {NO_LIMIT}"):
        intake.check_shape(StepKey(1, 0, 0), (1, NO_LIMIT + 1, 4))
