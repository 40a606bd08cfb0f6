"""Metrics: loaded by name, tried, and checked at every call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.errors import SettingError
from fedsplit.loading import name_of
from fedsplit.metrics.metric import METRICS, MetricFailed, asked_by, load_metrics, measure, try_metrics

MINE = """
def length(logits, labels):
    return labels.numel(), len(labels)

class Named:
    def __init__(self, model: str) -> None:
        self.model = model
    def __call__(self, logits, labels):
        return len(self.model), 1

def raises(logits, labels):
    raise RuntimeError("no references")

def exits(logits, labels):
    raise SystemExit(3)

def mean(logits, labels):
    return logits.mean()

def nothing(logits, labels):
    pass

def three(logits, labels):
    return 1, 2, 3

def nan(logits, labels):
    return float("nan"), 1.0

def less(logits, labels):
    return 1.0, -1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_every_name_is_a_metric_that_works_on_tokens_and_on_classes() -> None:
    """Except that a class is compared with no base model."""
    metrics = load_metrics([*METRICS], {})
    try_metrics(metrics, [*METRICS], 7, classifies=False)
    alone = {name: metric for name, metric in metrics.items() if not asked_by(metric)}
    try_metrics(alone, [*alone], 7, classifies=True)


def test_a_class_takes_options(file: Path) -> None:
    metrics = load_metrics([f"{file}:Named", f"{file}:length"], {"model": "abc"}, options={"Named.model": "abcde"})
    assert measure(metrics, torch.zeros(1, 1, 5), torch.zeros(1, 1, dtype=torch.long))["Named"] == (5.0, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"Named.stem": 1}, "metric.Named.stem: 1 is not possible; allowed: model"),
        ({"length.stem": 1}, "metric.length.stem: 1 is not possible; allowed: no option, since .*length is a function"),
        ({"rouge.stem": 1}, r"metric.rouge.stem: 1 is not possible; allowed: an option of Named \| length"),
        ({"Named.model": 3}, r"metric: .*Named is not possible; allowed: options that it takes \(TypeError"),
    ],
)
def test_options_that_a_metric_does_not_take_are_refused(file: Path, options: dict[str, object], words: str) -> None:
    code = file.read_text().replace("self.model = model", "self.model = model + ''")
    file.write_text(code)
    with pytest.raises(SettingError, match=f"^{words}"):
        load_metrics([f"{file}:Named", f"{file}:length"], {"model": "abc"}, options=options)


def test_an_object_takes_no_options() -> None:
    with pytest.raises(SettingError, match=r"metric.mine.x: 1 .* allowed: no option, since the metric is"):
        load_metrics(["m:mine(...)"], {}, {"m:mine(...)": len}, {"mine.x": 1})
    with pytest.raises(SettingError, match=r"metric.mine.x: 1 .* allowed: no option, since metric is emp"):
        load_metrics([], {}, options={"mine.x": 1})


def test_functions_and_classes_are_reported_under_their_names(file: Path) -> None:
    metrics = load_metrics(["token_accuracy", f"{file}:length", f"{file}:Named"], {"model": "abc"})
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    assert measure(metrics, logits, labels) == {"token_accuracy": (6.0, 6.0), "length": (6.0, 2.0), "Named": (3.0, 1.0)}
    assert name_of("package.module:rouge") == "rouge"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"failed: RuntimeError: no references \(mine.py, line 12\), on a trial"),
        ("exits", r"failed: SystemExit: 3 \(mine.py, line \d+\), on a trial"),
        ("mean", r"returned a tensor with the shape \(\), not a sum and a count"),
        ("nothing", "returned None, not a sum and a count"),
        ("three", "returned a tuple, not a sum and a count"),
        ("nan", "returned nan as its sum and 1 as its count"),
        ("less", "returned 1 as its sum and -1 as its count"),
    ],
)
def test_a_metric_that_does_not_work_is_named_before_the_run(file: Path, name: str, message: str) -> None:
    specs = ["token_accuracy", f"{file}:{name}"]
    with pytest.raises(SettingError, match=f"^metric: .*{name} is not possible; allowed: .*{message}") as caught:
        try_metrics(load_metrics(specs, {}), specs, 5, False)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_no_fault_of_the_metric(file: Path) -> None:
    metric = load_metrics([f"{file}:nan"], {})["nan"]
    assert metric(torch.full((1, 1, 2), torch.nan), torch.zeros(1, 1, dtype=torch.long)) == (0.0, 0.0)
    with pytest.raises(MetricFailed, match="returned nan as its sum"):
        metric(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))


def test_names_that_are_missing_or_double_are_refused(file: Path) -> None:
    with pytest.raises(SettingError, match=r"^metric: rouge is not possible; .* | token_accuracy, path/to/mine.py"):
        load_metrics(["rouge"], {})
    with pytest.raises(SettingError, match="metrics of different names; two are named length"):
        load_metrics([f"{file}:length", f"{file}:length"], {})
