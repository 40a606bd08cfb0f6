"""Objectives: loaded by name, tried, and checked at every call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fedsplit.errors import SettingError
from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.objective import (
    OBJECTIVES,
    ObjectiveFailed,
    cross_entropy,
    demands_of,
    load_objective,
    try_objective,
)

MINE = """
import torch
from torch.nn import functional

class Focal:
    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = gamma
    def __call__(self, logits, labels):
        losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        chosen = labels.flatten() != -100
        return ((1 - (-losses).exp()) ** self.gamma * losses)[chosen].mean()

def raises(logits, labels):
    return logits / 0 if labels.ndim == 9 else [][1]

def exits(logits, labels):
    raise SystemExit(3)

def rows(logits, labels):
    return logits.flatten(0, -2)[:, 0]

def number(logits, labels):
    return 3.0

def detached(logits, labels):
    return logits.detach().mean().square()

def whole(logits, labels):
    return labels.sum()

def nan(logits, labels):
    return logits.mean() * float("nan")

def negative(logits, labels):
    return logits.mean() * 0 - 1

def steep(logits, labels):
    return (logits - logits).square().sum().sqrt()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_cross_entropy_is_left_to_the_top() -> None:
    assert load_objective("cross_entropy", {}, {}) is None
    try_objective(None, "cross_entropy", 5, False)


def test_cross_entropy_leaves_out_what_is_not_predicted() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 4]])
    chosen = torch.stack([logits[0, 0], logits[0, 2], logits[1, 2]]).log_softmax(-1)
    assert torch.allclose(cross_entropy(logits, labels), -chosen[[0, 1, 2], [1, 2, 4]].mean())


def test_every_name_is_an_objective_that_works_on_tokens_and_on_classes() -> None:
    """Except that a class is compared with no base model, and is no pair."""
    for name in OBJECTIVES:
        objective = load_objective(name, {}, {})
        for classifies in (False,) if demands_of(objective).compares else (False, True):
            try_objective(objective, name, 7, classifies)


@pytest.mark.parametrize(("mean_over", "weights"), [("labels", [3, 2]), ("sequences", [2, 2]), ("pairs", [1, 1])])
def test_an_objective_says_what_its_loss_is_a_mean_over(mean_over: str, weights: list[int], file: Path) -> None:
    def loss(logits, labels, mask):
        raise NotImplementedError

    loss.mean_over = mean_over  # type: ignore[attr-defined]
    demands = demands_of(loss)
    labels = torch.tensor([[5, 6, 7], [5, 6, IGNORED]]), torch.tensor([[5, 6, 7], [IGNORED] * 3])
    assert [demands.weight(some) for some in labels] == weights
    assert (demands.further, demands.compares) == ({"mask"}, False)
    assert demands.weight(torch.tensor([1, 0])) == 2 // demands.rows
    file.write_text(f"def loss(logits, labels):\n    return logits.sum()\nloss.mean_over = {mean_over!r}\n")
    assert demands_of(load_objective(f"{file}:loss", {}, {})).mean_over == mean_over


def test_a_mean_that_does_not_exist_is_refused(file: Path) -> None:
    file.write_text("def loss(logits, labels):\n    return logits.sum()\nloss.mean_over = 'words'\n")
    with pytest.raises(SettingError, match=r"mean_over is labels | sequences | pairs \(it is 'words'\)"):
        load_objective(f"{file}:loss", {}, {})


def test_a_users_objective_is_called_with_its_options(file: Path) -> None:
    focal = load_objective(f"{file}:Focal", {"gamma": 0.0}, {})
    assert focal is not None
    try_objective(focal, "mine", 7, False)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORED, 2], [0, 3, 4]])
    assert torch.allclose(focal(logits, labels), cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"failed: IndexError: list index out of range \(mine.py, line 14\), on a trial"),
        ("rows", r"returned a tensor of torch.float32 with the shape \(8,\), not a scalar of floating-point type"),
        ("exits", r"failed: SystemExit: 3 \(mine.py, line \d+\), on a trial"),
        ("number", "returned a float, not a tensor"),
        ("detached", "returned a loss without a gradient"),
        ("whole", r"returned a tensor of torch.int64 with the shape \(\), not a scalar"),
        ("nan", "returned nan, not a number of 0 or more"),
        ("negative", "returned -1, not a number of 0 or more"),
        ("steep", "an objective whose gradient is finite"),
    ],
)
def test_an_objective_that_does_not_work_is_named_before_the_run(file: Path, name: str, message: str) -> None:
    spec = f"{file}:{name}"
    with pytest.raises(SettingError, match=f"^objective: .*{name} is not possible; allowed: .*{message}") as caught:
        try_objective(load_objective(spec, {}, {}), spec, 5, False)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_no_fault_of_the_objective(file: Path) -> None:
    """Training has diverged then, which the client says."""
    focal = load_objective(f"{file}:Focal", {}, {})
    assert focal is not None
    assert not torch.isfinite(focal(torch.full((1, 2, 5), torch.nan), torch.zeros(1, 2, dtype=torch.long)))
    with pytest.raises(ObjectiveFailed, match=r"the objective .*mine.py:nan returned nan"):
        load_objective(f"{file}:nan", {}, {})(torch.ones(1, 2, 5), torch.zeros(1, 2, dtype=torch.long))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("focal", {}, "^objective: focal is not possible; allowed: cross_entropy | label_smoothing, path/to/mine.py:M"),
        ("label_smoothing", {"gamma": 1}, "^objective.gamma: 1 is not possible; allowed: smoothing$"),
        ("label_smoothing", {"smoothing": 1.5}, "^objective.smoothing: 1.5 is not possible; .*from 0 to below 1"),
        ("cross_entropy", {"smoothing": 0.5}, "^objective.smoothing: 0.5 is not possible; allowed: no option"),
        ("fedsplit.scores:Score", {}, "^objective: .* a function of logits and labels, or a class with a method"),
    ],
)
def test_a_name_or_an_option_that_is_not_there_is_refused(spec: str, options: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load_objective(spec, options, {})


def test_a_copy_of_the_shipped_page_is_an_objective(tmp_path: Path) -> None:
    copy = tmp_path / "mine.py"
    copy.write_text(Path("fedsplit/objectives/label_smoothing.py").read_text())
    own, shipped = (load_objective(name, {}, {}) for name in (f"{copy}:LabelSmoothing", "label_smoothing"))
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORED, 2], [0, 3, 4]])
    assert own is not None and shipped is not None and torch.equal(own(logits, labels), shipped(logits, labels))


@pytest.mark.parametrize(("name", "asked"), [("Focal", set()), ("Near", {"reference"})])
def test_the_objectives_of_the_documentation_work(name: str, asked: set[str], file: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", Path("docs/objectives.md").read_text(), re.DOTALL)
    (snippet,) = (snippet for snippet in snippets if f"class {name}:" in snippet)
    file.write_text(snippet)
    objective = load_objective(f"{file}:{name}", {}, {})
    try_objective(objective, name, 11, False)
    assert demands_of(objective).further == asked
