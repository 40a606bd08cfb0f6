"""Trackers of experiments as sinks, by accelerate's classes: TensorBoard, Weights & Biases, MLflow and Trackio.

Every value has a name of the form `held_out/loss`, of a client `clients/held_out/loss/NAME`. The step is the round.
"""

from __future__ import annotations

import importlib.util
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fedsplit.errors import ErrorCollector, SettingError
from fedsplit.events.event_types import (
    Event,
    RoundAggregated,
    RoundCost,
    RoundEvaluated,
    RoundTrained,
    RunEnded,
    RunStarted,
)
from fedsplit.events.sink import Sink
from fedsplit.settings.documents import dotted

PROJECT = "fedsplit"
"""Name of the project or experiment at trackers that have such."""

_UNUSUAL = re.compile(r"[^\w./ :-]+")
"""Characters that a tracker may refuse in a name."""


class Tracker(Sink):
    """A sink that sends the values of a run to a tracker.

    The tracker is started by the first event of the run, when all settings are known and all clients are there.

    Attributes:
        package: Module that must be installed.
    """

    package: ClassVar[str]

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._tracker: Any = None

    def handle(self, event: Event) -> None:
        """Starts the tracker, or sends the values of an event."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif self._tracker is not None:
            values = dict(values_of(event))
            if values:
                # The end of a run has no round, and so no step.
                self._tracker.log(values, step=getattr(event, "round", None))

    def _start(self, event: RunStarted) -> None:
        """Starts the tracker, and sends the settings."""
        from accelerate.state import PartialState

        PartialState(cpu=True)  # accelerate's log asks for a state; none of its devices or processes are used
        tracker = self.make(Path(event.folder))
        tracker.start()
        tracker.store_init_configuration(settings_of(event))
        # Only now: a tracker that fails as it starts gets no values, and has nothing to finish.
        self._tracker = tracker

    @abstractmethod
    def make(self, folder: Path) -> Any:
        """Returns a tracker of accelerate's that is not started.

        Args:
            folder: Folder of the run.
        """
        ...

    def close(self) -> None:
        """Ends the tracker's run."""
        # Forgotten before it is finished, so that a second call does nothing.
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.finish()


class TensorBoard(Tracker):
    """Writes event files into the run's folder, for `tensorboard --logdir runs`."""

    package = "tensorboard"

    def make(self, folder: Path) -> Any:
        """Returns the tracker; see `Tracker.make`."""
        from accelerate.tracking import TensorBoardTracker

        # accelerate makes a folder of this name in the run's folder.
        return TensorBoardTracker("tensorboard", logging_dir=folder)


class WeightsAndBiases(Tracker):
    """Sends values to Weights & Biases, with its files in the run's folder."""

    package = "wandb"

    def make(self, folder: Path) -> Any:
        """Returns the tracker; see `Tracker.make`."""
        from accelerate.tracking import WandBTracker

        return WandBTracker(PROJECT, name=folder.name, dir=str(folder))


class MLflow(Tracker):
    """Sends values to MLflow: to `MLFLOW_TRACKING_URI`, or to MLflow's own files in the working directory."""

    package = "mlflow"

    def make(self, folder: Path) -> Any:
        """Returns the tracker; see `Tracker.make`."""
        from accelerate.tracking import MLflowTracker

        return MLflowTracker(PROJECT, run_name=folder.name)


class Trackio(Tracker):
    """Writes values to Trackio's database of this machine."""

    package = "trackio"

    def make(self, folder: Path) -> Any:
        """Returns the tracker; see `Tracker.make`."""
        from accelerate.tracking import TrackioTracker

        return TrackioTracker(PROJECT, name=folder.name)


TRACKERS: Mapping[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Trackers by the names for `--track`, which are those of the extras that install them."""


def check_trackers(names: Sequence[str]) -> None:
    """Makes sure that the packages of trackers are installed, without importing them.

    Raises:
        InputError: A package is missing. All errors are reported together.

    Example:
        >>> check_trackers([])
    """
    collector = ErrorCollector()
    for name in names:
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            allowed = f"a tracker that is installed; pip install 'fedsplit[{name}]' installs it"
            collector.extend([SettingError("track", name, allowed)])
    collector.check()


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """Makes the sinks of trackers. Nothing is imported or opened before the run starts.

    Example:
        >>> [type(tracker).__name__ for tracker in make_trackers(["tensorboard"])]
        ['TensorBoard']
    """
    return [TRACKERS[name]() for name in names]


def settings_of(event: RunStarted) -> dict[str, str | int | float | bool]:
    """Returns the settings of a run as plain values by dotted name, with the versions of the libraries."""
    values: dict[str, Any] = {**dotted(event.settings), "folder": event.folder}
    values |= {f"versions.{name}": version for name, version in event.versions.items()}
    plain: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):  # options of a class
            plain |= {f"{name}.{key}": inner for key, inner in value.items()}
        # Some trackers take plain values only.
        elif isinstance(value, list | tuple):
            plain[name] = ",".join(map(str, value))
        else:
            plain[name] = value
    return plain


def values_of(event: Event) -> Iterator[tuple[str, float]]:
    """Yields the values of an event by name.

    Example:
        >>> event = RoundAggregated(round=1, seconds=0.5, error=None, layers={}, residual_rank={}, elapsed=2.0)
        >>> dict(values_of(event))
        {'aggregation/seconds': 0.5}
    """
    for name, value in _named_values(event):
        if value is not None:
            yield _UNUSUAL.sub("_", name), float(value)


def _named_values(event: Event) -> Iterator[tuple[str, float | None]]:
    """Yields the values of an event by name, those that are missing included."""
    match event:
        case RoundTrained():
            yield "train/loss", event.loss
            yield "train/learning_rate", event.learning_rate
            yield "train/router_aux_loss", event.router_aux_loss
            yield "train/tokens", event.tokens
            yield "train/seconds", event.seconds
            yield from _by_client("train/loss", event.clients)
        case RoundAggregated():
            yield "aggregation/error", event.error
            yield "aggregation/seconds", event.seconds
        case RoundEvaluated():
            yield "held_out/loss", event.loss
            yield "held_out/perplexity", event.perplexity
            yield "held_out/accuracy", event.accuracy
            yield "held_out/seconds", event.seconds
            yield from _by_client("held_out/loss", event.clients)
            yield from _by_client("held_out/forgotten", event.forgotten)
            for metric, value in (event.metrics or {}).items():
                yield f"held_out/{metric}", value
            for metric, by_client in (event.client_metrics or {}).items():
                yield from _by_client(f"held_out/{metric}", by_client)
        case RoundCost():
            yield "tokens_per_second", event.tokens_per_second
            for kind, count in event.bytes.items():
                yield f"bytes/{kind}", count
            for kind, counts in event.client_bytes.items():
                yield from _by_client(f"bytes/{kind}", counts)
            for phase, seconds in event.seconds.items():
                yield f"seconds/{phase}", seconds
        case RunEnded():
            yield "final/held_out_loss", event.summary["eval_loss"]["after"]
            yield "final/wall_seconds", event.summary["wall_seconds"]


def _by_client(
    name: str,
    values: Mapping[str, float | None],
) -> Iterator[tuple[str, float | None]]:
    """Yields the values of clients by name."""
    for client, value in values.items():
        yield f"clients/{name}/{client}", value
