"""The objective and the metrics that a run's settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.client.measures import (
    check_format,
    check_measures,
    check_pairs,
    check_reference,
    load_measures,
    metric_options_of,
    metrics_of,
    who_compares,
)
from fedsplit.errors import InputError, SettingError
from fedsplit.objectives.objective import demands_of
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


def test_who_compares_with_the_base_model_is_found_by_its_signature(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def apart(logits, labels, reference):\n    return 0.0, 1.0\n")
    metric = f"token_accuracy,{tmp_path}/mine.py:apart"
    for values, found in (
        ({"objective": "distillation"}, ("objective", "distillation")),
        ({"objective": "label_smoothing"}, None),
        ({"metric": metric}, ("metric", "apart")),
        ({"metric": metric, "objective": "distillation"}, ("objective", "distillation")),
    ):
        config = build(values)
        assert who_compares(config, load_measures(config)) == found


@pytest.mark.parametrize(
    ("values", "folds", "message"),
    [
        ({}, True, "under the strategy fedavg, which adds what it learns to the base weights"),
        ({"lora.method": "pissa"}, False, "with adapters of the kind pissa, which take their start out of the base"),
        ({"lm_head": "full"}, False, "with --lm-head full, which trains the weights of the base's head"),
    ],
)
def test_a_base_that_is_lost_is_compared_with_by_nobody(values: dict, folds: bool, message: str) -> None:
    config = build({"objective": "distillation", **values})
    with pytest.raises(SettingError, match=f"^objective: distillation is not possible; .*{message}"):
        check_reference(config, load_measures(config), folds)
    plain = build(values)
    check_reference(plain, load_measures(plain), folds)


def test_a_base_without_the_head_of_the_classes_is_compared_with_by_nobody() -> None:
    config = build({"objective": "distillation"})
    check_measures(config, load_measures(config))
    with pytest.raises(SettingError, match=r"^objective: distillation is not .* the base model has no head for them"):
        check_measures(config, load_measures(config), classes=3)


def test_what_a_split_cannot_give_is_refused_as_the_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(logits, labels, hidden_states):\n    return logits.sum()\n")
    for setting in ("objective", "metric"):
        with pytest.raises(SettingError, match=rf"^{setting}: .*mine.py:loss, which asks for hidden_states \(hidden"):
            load_measures(build({setting: f"{tmp_path}/mine.py:loss"}))


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({}, []),
        ({"train.batch_size": 3}, ["train.batch_size: 3 is not possible; allowed: an even number under the objective"]),
        ({"train.micro_batches": 3}, ["train.micro_batches: 3 is not possible; allowed: 0 to 2 under the objective"]),
        (
            {"train.samples": 5, "eval.samples": 1},
            [
                "train.samples: 5 is not possible; allowed: an even",
                "eval.samples: 1 is not possible; allowed: 2 or more",
            ],
        ),
    ],
)
def test_numbers_of_sequences_hold_whole_pairs(values: dict, messages: list[str]) -> None:
    for objective, expected in (("dpo", messages), ("distillation", [])):
        config = build({"objective": objective, **values})
        demands = demands_of(load_measures(config)[0])
        if not expected:
            check_pairs(config, demands)
            continue
        with pytest.raises(InputError) as caught:
            check_pairs(config, demands)
        lines = str(caught.value).splitlines()
        assert len(lines) == len(expected)
        assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


@pytest.mark.parametrize(
    ("values", "format", "message"),
    [
        (
            {"objective": "dpo"},
            "chat",
            "objective: dpo is not .* for data of the format chat; pairs are in columns chosen",
        ),
        ({"objective": "distillation"}, "preference", "objective: distillation is not possible; allowed: dpo, or an"),
        ({"metric": "preference_margin"}, "text", "metric: preference_margin is not possible; .*the format text"),
    ],
)
def test_pairs_and_objectives_over_pairs_go_together(values: dict, format: str, message: str) -> None:
    config = build(values)
    with pytest.raises(SettingError, match=f"^{message}"):
        check_format(config, load_measures(config), format)


def test_runs_on_pairs_measure_the_preference_with_the_objectives_beta() -> None:
    values = {"objective": "dpo", "data.format": "preference", "metric": "token_accuracy,preference_margin"}
    config = build(values, None, {"beta": 0.4})
    assert metrics_of(config) == ("token_accuracy", "preference_margin", "preference_accuracy")
    _, metrics = load_measures(config)
    assert metrics["preference_margin"]._metric.beta == 0.4  # type: ignore[attr-defined]
    named = build(values, None, {"beta": 0.4}, {"preference_margin": {"beta": 1.0}})
    assert metric_options_of(named) == {"preference_margin.beta": 1.0}
    assert metrics_of(build({"objective": "dpo"})) == ()
    check_measures(config, load_measures(config))
