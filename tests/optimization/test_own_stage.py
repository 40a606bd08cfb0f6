"""A strategy's own stage: loaded by name, and checked at every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.optimization.own_stage import OwnStage, StageFailed, stage_maker
from fedsplit.settings.documents import build
from fedsplit.stages import GradientStage, LocalStep, Outcome, RoundStart, Rows
from fedsplit.wire.steps import StaleStep
from fedsplit.wire.transport import TrunkLost
from strategies.fedavg import FedAvg

W = {"w": torch.tensor([1.0, 2.0])}
STEP = LocalStep(W)
IDS = torch.ones(1, 2, dtype=torch.long)
ROWS = Rows(IDS, IDS, None, states_at=lambda adapter: torch.zeros(1, 2, 3))
FILE = Path(__file__).parent.parent / "own_stages.py"


class Maker:
    """A strategy whose stage is a `GradientStage` with some methods replaced."""

    def __init__(self, made: Any = None, **methods: Any) -> None:
        self._made, self._methods = made, methods

    def stage(self) -> Any:
        if self._made is not None:
            return self._made
        return type("Mine", (GradientStage,), self._methods)()


def test_a_strategy_without_a_stage_has_no_maker() -> None:
    assert stage_maker(build({"strategy": "fedprox"}, {"mu": 0.1})) is None


def test_a_stage_is_made_anew_each_time_with_the_strategys_options() -> None:
    make = stage_maker(build({"strategy": f"{FILE}:FedDyn", "clients": 5}, {"alpha": 0.7}))
    assert make is not None
    one, two = make(), make()
    assert one is not two
    one.begin(RoundStart(W))
    moved = {"w": W["w"] + 1}
    assert torch.allclose(one({"w": torch.zeros(2)}, LocalStep(moved))["w"], torch.full((2,), 0.7))
    assert torch.allclose(one.end(moved).kept["w"], torch.full((2,), -0.7))


def failing(error: Exception) -> Any:
    def method(self: object, *args: object) -> None:
        raise error

    return method


def returning(value: Any) -> Any:
    return lambda self, *args: value


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"__call__": failing(KeyError("w"))}, r"failed in a step: KeyError: 'w' \(test_own_stage.py, line \d+\)"),
        ({"loss_term": failing(ValueError("no"))}, "failed to make a term of the loss: ValueError: no"),
        ({"loss_term": returning(3.0)}, "made a float as its term of the loss, not a function or None"),
        ({"loss_term": returning(lambda states: 1 / 0)}, "failed in its term of the loss: ZeroDivisionError"),
        ({"loss_term": returning(lambda states: 3.0)}, "returned a float as its term of the loss, not a tensor"),
        (
            {"loss_term": returning(lambda states: states)},
            r"returned a tensor of .* with the shape \(1, 2, 3\)",
        ),
        ({"loss_term": returning(lambda states: states.detach().sum())}, "returned a term of the loss without a grad"),
        ({"loss_term": returning(lambda states: states.sum().log())}, "returned -inf as its term of the loss"),
        ({"begin": failing(SystemExit(3))}, "failed at the round's begin: SystemExit: 3"),
        ({"begin": failing(ValueError("no"))}, "failed at the round's begin: ValueError: no"),
        ({"end": failing(ValueError("no"))}, "failed at the round's end: ValueError: no"),
        ({"personalise": failing(ValueError("no"))}, "failed to personalise an adapter: ValueError: no"),
        ({"__call__": returning({})}, "returned gradients of other names than it was given"),
        ({"__call__": returning(None)}, "returned gradients of other names"),
        ({"__call__": returning({"w": 1.0})}, r"returned gradients with w as float, not with the shape \(2,\)"),
        (
            {"__call__": returning({"w": torch.zeros(3)})},
            r"returned gradients with w as \(3,\), not with the shape \(2,\)",
        ),
        (
            {"__call__": returning({"w": torch.full((2,), torch.nan)})},
            "returned gradients that are NaN, infinite",
        ),
        ({"end": returning(W)}, "ended with a dict, not a fedsplit.stages.Outcome"),
        ({"end": returning(Outcome(kept={"h": 1.0}))}, "keeps h as a float, not as a tensor"),  # type: ignore[dict-item]
        ({"end": returning(Outcome(kept={"h": torch.tensor(torch.inf)}))}, "keeps NaN or infinite values in h"),
        ({"end": returning(Outcome(sent={"h": torch.zeros(2)}))}, "returned tensors to send of other names"),
        ({"personalise": returning({})}, "returned a personal adapter of other names"),
    ],
)
def test_an_error_or_an_unusable_value_names_the_strategy(methods: dict[str, Any], message: str) -> None:
    with pytest.raises(StageFailed, match=f"^the stage of the strategy mine.py:Mine {message}") as caught:
        stage = OwnStage(Maker(**methods), "mine.py:Mine")
        stage.begin(RoundStart(W))
        term = stage.loss_term(ROWS)
        if term is not None:
            term(torch.zeros(1, 2, 3, requires_grad=True))
        stage(W, STEP)
        stage.end(W)
        stage.personalise(RoundStart(W))
    assert "\n" not in str(caught.value)


def test_a_stage_that_is_none_is_named() -> None:
    with pytest.raises(StageFailed, match=r"^the stage of the strategy m is a FedAvg, not a fedsplit.stages.G"):
        OwnStage(Maker(FedAvg()), "m")


def test_a_gradient_that_was_not_finite_before_is_no_fault_of_the_stage() -> None:
    spoilt = {"w": torch.full((2,), torch.inf)}
    assert OwnStage(Maker(), "m")(spoilt, STEP)["w"].isinf().all()


@pytest.mark.parametrize("error", [StaleStep("late"), TrunkLost("gone")])
def test_an_error_of_the_trunk_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        OwnStage(Maker(__call__=failing(error)), "m")(W, STEP)
    with pytest.raises(type(error), match=str(error)):
        OwnStage(Maker(loss_term=failing(error)), "m").loss_term(ROWS)


def test_a_term_of_states_that_are_not_finite_is_no_fault_of_the_stage() -> None:
    term = OwnStage(Maker(loss_term=returning(torch.sum)), "m").loss_term(ROWS)
    assert term is not None and term(torch.full((1, 2, 3), torch.nan)).isnan()
