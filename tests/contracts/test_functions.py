"""The contracts of objectives and metrics: every rule is broken by a function that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsplit.contracts.functions import check_metric, check_objective
from fedsplit.metrics.metric import METRICS, load_metrics
from fedsplit.objectives.objective import OBJECTIVES, load_objective


def nats(logits: Tensor, labels: Tensor, **how: Any) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), **how)


def negative(logits: Tensor, labels: Tensor) -> Tensor:
    return -nats(logits, labels)


def flat(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits * 0).sum()


def drawn(logits: Tensor, labels: Tensor) -> Tensor:
    return nats(logits * torch.rand(()), labels)


def masked_too(logits: Tensor, labels: Tensor) -> Tensor:
    return nats(logits, labels.clamp(min=0))


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return nats(logits, labels, reduction="sum")


def in_place(logits: Tensor, labels: Tensor) -> Tensor:
    loss = nats(logits, labels)
    labels += 1
    return loss


def without_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    return nats(logits.detach(), labels).requires_grad_()


def coarse(logits: Tensor, labels: Tensor) -> Tensor:
    return nats(logits.bfloat16(), labels)


def coarse_inside(logits: Tensor, labels: Tensor) -> Tensor:
    return coarse(logits, labels).float()


OBJECTIVE_RULES: dict[Callable[..., Any], str] = {
    negative: "loss",
    flat: "gradient",
    drawn: "same result",
    masked_too: "masked positions",
    summed: "mean",
    in_place: "inputs",
}


@pytest.mark.parametrize("function", OBJECTIVE_RULES)
def test_objectives_that_break_a_rule(function: Callable[..., Any]) -> None:
    checks = check_objective(load_objective("mine.py:f", {}, {}, function))
    assert OBJECTIVE_RULES[function] in [check.name for check in checks if check.fault]
    assert "\n" not in "".join(check.fault for check in checks)


def test_a_loss_that_does_not_depend_on_the_logits_is_one_fault() -> None:
    checks = check_objective(load_objective("f", {}, {}, without_gradient))
    assert [check.fault for check in checks if check.fault] == [
        "the loss does not depend on the logits: they get no gradient from it"
    ]
    assert {check.untried for check in checks} == {"", "loss"}


@pytest.mark.parametrize("function", [coarse, coarse_inside])
def test_rounding_of_a_coarse_type_is_no_fault(function: Callable[..., Any]) -> None:
    assert not [check for check in check_objective(load_objective("f", {}, {}, function)) if check.fault]


def test_a_random_state_that_is_used_is_named() -> None:
    checks = {check.name: check.fault for check in check_objective(load_objective("f", {}, {}, drawn))}
    assert "changes the dropout of the run" in checks["side effects"]


def none(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return 0.0, 0.0


def means(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return float(logits.argmax(-1).eq(labels)[labels >= 0].float().mean()), 1.0


def everywhere(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return float(logits.sum()), float(labels.numel())


def counts_all(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return float((logits.argmax(-1) == labels).sum()), float(labels.numel())


METRIC_RULES = {none: "sum and count", means: "sums", everywhere: "masked positions", counts_all: "padding"}


@pytest.mark.parametrize("function", METRIC_RULES)
def test_metrics_that_break_a_rule(function: Callable[..., Any]) -> None:
    (metric,) = load_metrics(["mine.py:f"], {}, {"mine.py:f": function}).values()
    assert METRIC_RULES[function] in [check.name for check in check_metric(metric) if check.fault]


def test_those_of_fedsplit_keep_their_contracts() -> None:
    for name in OBJECTIVES:
        assert not [check for check in check_objective(load_objective(name, {}, {})) if check.fault], name
    for name in METRICS:
        (metric,) = load_metrics([name], {}).values()
        assert not [check for check in check_metric(metric) if check.fault], name
