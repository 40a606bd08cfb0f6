"""Trackers as sinks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fedsplit.errors import InputErrors
from fedsplit.events import Event, Notice, RoundEvaluated, RunStarted, Sink
from fedsplit.events.emitter import Emitter
from fedsplit.settings.choices import TRACKERS as NAMES
from fedsplit.tracking import trackers
from fedsplit.tracking.trackers import TRACKERS, TensorBoard, check_trackers, make_trackers, settings_of

EVALUATED: dict[str, Any] = {
    "loss": 2.0,
    "clients": {"Änn (1)": 1.5, "bob": 2.5},
    "metrics": {"rouge": None},
    "client_metrics": {"rouge": {"bob": 0.5}},
    "forgotten": {},
    "adapter_bytes": {},
    "bytes": {},
    "tokens": 9,
    "seconds": 0.5,
    "elapsed": 1.0,
}


def started(folder: Path) -> RunStarted:
    settings = {"clients": 2, "lora": {"rank": [2, 4]}, "strategy_options": {"mu": 0.5}, "track": ["tensorboard"]}
    return RunStarted(
        settings=settings,
        versions={"torch": "2"},
        clients=["Änn (1)", "bob"],
        parameters={},
        aggregated_parts=[],
        after_round=0,
        folder=str(folder),
    )


def test_tensorboard_has_the_values_by_round_and_client(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoard()
    sink.handle(Notice(text="before the start"))
    sink.handle(started(tmp_path))
    for number in (0, 1):
        sink.handle(RoundEvaluated(round=number, **{**EVALUATED, "loss": 2.0 - number}))
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("held_out/loss")] == [(0, 2.0), (1, 1.0)]
    tags = set(events.Tags()["scalars"])
    assert {"clients/held_out/loss/Änn _1_", "clients/held_out/loss/bob", "clients/held_out/rouge/bob"} <= tags
    assert "held_out/rouge" not in tags  # there is no value
    (settings,) = tmp_path.glob("tensorboard/*/hparams.yml")
    assert "lora.rank: 2,4" in settings.read_text() and "strategy_options.mu: 0.5" in settings.read_text()


def test_settings_are_plain_values(tmp_path: Path) -> None:
    values = settings_of(started(tmp_path))
    assert values["lora.rank"] == "2,4" and values["versions.torch"] == "2" and values["folder"] == str(tmp_path)
    assert {type(value) for value in values.values()} <= {str, int, float, bool}


def test_packages_that_are_missing_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(TRACKERS) == NAMES
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputErrors) as caught:
        check_trackers(["wandb", "trackio"])
    first, second = str(caught.value).splitlines()
    assert first == (
        "track: wandb is not possible; allowed: a tracker that is installed; pip install 'fedsplit[wandb]' installs it"
    )
    assert "fedsplit[trackio]" in second


class Lines(Sink):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.lines.append(event.text)


class Broken:
    """A tracker whose server goes away."""

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int | None) -> None:
        raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_costs_a_line_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorBoard, "make", lambda self, folder: Broken())
    screen = Lines()
    with Emitter([screen], make_trackers(["tensorboard"])) as emit:
        emit(started(tmp_path))
        for number in (0, 1):
            emit(RoundEvaluated(round=number, **EVALUATED))
    (line,) = screen.lines
    assert "the sink TensorBoard failed and is left out from here on: ConnectionError: the server is gone" in line


def test_each_tracker_is_one_of_accelerates(tmp_path: Path) -> None:
    """Made without its package, which only `start` imports."""
    made = {name: type(sink.make(tmp_path)).__name__ for name, sink in zip(NAMES, make_trackers(NAMES), strict=True)}
    assert made == {
        "tensorboard": "TensorBoardTracker",
        "wandb": "WandBTracker",
        "mlflow": "MLflowTracker",
        "trackio": "TrackioTracker",
    }
    assert trackers.PROJECT == "fedsplit"
