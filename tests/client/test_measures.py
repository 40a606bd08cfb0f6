"""The objective and the metrics that a run's settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.client.measures import check_measures, load_measures
from fedsplit.errors import SettingError
from fedsplit.settings.documents import build

MINE = """
class Vocabulary:
    def __init__(self, model: str) -> None:
        self.model = model
    def __call__(self, logits, labels):
        return logits.shape[-1], 1
"""


def test_a_class_that_takes_a_model_gets_the_models_folder(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    model = str(tiny_models["gpt2"])
    _, metrics = load_measures(build({"model": model, "metric": f"token_accuracy,{tmp_path}/mine.py:Vocabulary"}))
    assert metrics["Vocabulary"]._metric.model == model  # type: ignore[attr-defined]


def test_the_trial_has_the_models_vocabulary_or_the_datas_classes(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    seen = "class Seen:\n    def __call__(self, logits, labels):\n        raise ValueError(tuple(logits.shape))\n"
    (tmp_path / "mine.py").write_text(seen)
    config = build({"model": str(tiny_models["gpt2"]), "metric": f"{tmp_path}/mine.py:Seen"})
    for classes, shape in ((0, r"\(2, 4, \d\d+\)"), (3, r"\(2, 3\)")):
        with pytest.raises(SettingError, match=f"^metric: .*ValueError: {shape}"):
            check_measures(config, load_measures(config), classes)


def test_options_go_to_the_metrics_that_they_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    named = {"metric": f"token_accuracy,{tmp_path}/mine.py:Vocabulary"}
    _, metrics = load_measures(build(named, metric_options={"Vocabulary": {"model": "other"}}))
    assert metrics["Vocabulary"]._metric.model == "other"  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match=r"^metric.Vocabulary.size: 1 is not possible; allowed: model"):
        load_measures(build(named, metric_options={"Vocabulary.size": 1}))


def test_options_go_to_the_objective() -> None:
    objective, _ = load_measures(build({"objective": "label_smoothing"}, {}, {"smoothing": 0.3}))
    assert objective.smoothing == 0.3  # type: ignore[union-attr]
    with pytest.raises(SettingError, match=r"^objective.rate: 1 is not possible; allowed: smoothing"):
        load_measures(build({"objective": "label_smoothing"}, {}, {"rate": 1}))
