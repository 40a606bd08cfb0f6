"""Bytes of a step by hand-worked numbers; test_run_traffic.py compares them with runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.step_traffic import StepTraffic
from fedsplit.settings.documents import build

WIDTH = 128


def step(**settings: object) -> dict[str, int]:
    values = {name.replace("__", "."): value for name, value in settings.items()}
    config = build({"train.micro_batches": 1, "train.max_length": 16, **values})
    return dict(+StepTraffic(Parties(config)).step(config.train.batch_size * config.train.accumulation))


def test_hidden_states_and_gradients_are_as_large_as_their_values() -> None:
    values = 4 * 16 * WIDTH
    assert step() == dict.fromkeys(("activation_up", "activation_down", "gradient_up", "gradient_down"), 4 * values)
    assert step(wire__codec="bf16")["activation_up"] == 2 * values


def test_virtual_tokens_cross_in_front_of_the_text() -> None:
    crossed = step(prompt__kind="prompt", prompt__tokens=5)
    assert crossed["activation_up"] == 4 * 4 * (16 + 5) * WIDTH


def test_a_norm_and_a_coefficient_cross_once_a_step() -> None:
    plain = step(train__accumulation=2, train__micro_batches=2)
    clipped = step(train__accumulation=2, train__micro_batches=2, train__clip=1.0)
    assert clipped["gradient_up"] - plain["gradient_up"] == clipped["gradient_down"] - plain["gradient_down"] == 8


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"cut": "0:5"}, {"gradient_down"}),  # no adapter below the trunk
        ({"trunk__schedule": "forward-only"}, {"gradient_up", "gradient_down"}),
        ({"trunk__schedule": "frozen", "cut": "0:5"}, {"gradient_up", "gradient_down"}),
    ],
)
def test_gradients_that_nobody_can_use_do_not_cross(settings: dict[str, object], missing: set[str]) -> None:
    assert step().keys() - step(**settings).keys() == missing


def test_the_routers_sums_cross_both_ways(tiny_models: dict[str, Path]) -> None:
    model = {"model": str(tiny_models["qwen3_moe"]), "cut": "1:2"}
    plain = step(**model, router_aux_loss=0.0)
    balanced = step(**model, router_aux_loss=0.5)
    experts = 4
    assert balanced["activation_up"] - plain["activation_up"] == 4 * (2 * experts + 1)
    assert balanced["gradient_up"] - plain["gradient_up"] == 4 * experts
    assert balanced["gradient_down"] == plain["gradient_down"]
