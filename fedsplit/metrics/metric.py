"""Metrics: functions of the logits and the labels of held-out text, reported beside the loss.

Shapes: B sequences of T predicted positions, V tokens in the vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.errors import SettingError
from fedsplit.loading import OWN, Kind, described, make, name_of, options_by_name
from fedsplit.model.kernels import IGNORED

METRICS = {"token_accuracy": "fedsplit.metrics.token_accuracy:TokenAccuracy"}
"""The names that `--metric` takes, and where the classes are."""

METRIC = Kind("metric", lambda: METRICS, f"{' | '.join(sorted(METRICS))}, {OWN}", functions=True)
"""Metrics, for `--metric`."""


class Metric(Protocol):
    """A measure of held-out text that is a mean: over tokens, sequences, or anything else that can be counted."""

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns a batch's sum and its count.

        The metric of a client is the sum over all its batches divided by their count, that of a round the sum over all
        clients divided by their count. A batch on which there is nothing to measure has the count 0.

        Args:
            logits: (B, T, V) in float32, aligned with the labels; of a classifier (B, C).
            labels: Tokens (B, T), -100 where nothing is predicted (a prompt, padding, a virtual token); of a classifier
                classes (B,).
        """
        ...


class MetricFailed(Exception):
    """A metric raised an error, or returned no sum and count. The message names the metric and the reason."""


class _Checked:
    """A metric, each result of which is checked."""

    def __init__(self, name: str, metric: Metric) -> None:
        self._name, self._metric = name, metric

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns sum and count.

        Raises:
            MetricFailed: The metric raised an error, or returned something else.
        """
        try:
            found: Any = self._metric(logits, labels)
        except Exception as error:
            raise MetricFailed(f"the metric {self._name} failed: {described(error)}") from error
        try:
            total, count = (float(value) for value in found)
        except (TypeError, ValueError, RuntimeError):
            words = f"{_shown(found)}, not a sum and a count"
            raise MetricFailed(f"the metric {self._name} returned {words}") from None
        # NaN for logits that are not finite is no fault of the metric: training has diverged.
        usable = math.isfinite(total) and 0 <= count < math.inf
        if not usable and bool(torch.isfinite(logits).all()):
            raise MetricFailed(f"the metric {self._name} returned {total:g} as its sum and {count:g} as its count")
        return (total, count) if usable else (0.0, 0.0)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor with the shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, int | float) or value is None else f"a {type(value).__name__}"


def load_metrics(
    specs: Sequence[str],
    defaults: Mapping[str, Any],
    objects: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Metric]:
    """Makes metrics by their names.

    Args:
        specs: Of each one of `METRICS`, `path/to/mine.py:mine`, or `module:Class`. A function is taken as it is, a
            class is called.
        defaults: Keyword arguments to pass to classes that take them.
        objects: Metrics that are given as objects, by such a name.
        options: Keyword arguments from the user, by NAME.KEY.

    Returns:
        The metrics by the names under which they are reported.

    Raises:
        SettingError: There is no such metric, two would have one name, or one does not take its options.

    Example:
        >>> metrics = load_metrics(["token_accuracy"], {})
        >>> metrics["token_accuracy"](torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 0]]))
        (1.0, 2.0)
    """
    metrics: dict[str, Metric] = {}
    by_name = options_by_name(METRIC, specs, options or {})
    for spec in specs:
        keywords = by_name[name_of(spec)]
        if objects and spec in objects:
            for key, value in keywords.items():
                raise SettingError(f"metric.{name_of(spec)}.{key}", value, "no option, since the metric is an object")
            made = objects[spec]
        else:
            made = make(METRIC, spec, keywords, defaults, f"metric.{name_of(spec)}")
        if not callable(made):
            raise SettingError("metric", spec, "a function of logits and labels, or a class with a method __call__")
        if name_of(spec) in metrics:
            raise SettingError("metric", ",".join(specs), f"metrics of different names; two are named {name_of(spec)}")
        metrics[name_of(spec)] = _Checked(spec, made)
    return metrics


def try_metrics(metrics: Mapping[str, Metric], specs: Sequence[str], outputs: int, classifies: bool) -> None:
    """Calls each metric once on invented logits, so that its mistakes show before a run begins.

    Args:
        metrics: By name.
        specs: The names of the setting, in the same order.
        outputs: Tokens of the vocabulary, or classes.
        classifies: The labels are classes of sequences.

    Raises:
        SettingError: A metric failed.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, outputs) if classifies else (2, 4, outputs)
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(outputs, shape[:-1], generator=generator)
    if not classifies:
        labels[0, :1] = labels[1, 3:] = IGNORED  # as a prompt, and as padding
    for spec, metric in zip(specs, metrics.values(), strict=True):
        try:
            metric(logits.clone(), labels.clone())
        except MetricFailed as error:
            raise SettingError("metric", spec, f"a metric that works ({error}, on a trial)") from error


def measure(metrics: Mapping[str, Metric], logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Returns each metric's sum and count over a batch."""
    return {name: metric(logits, labels) for name, metric in metrics.items()}
