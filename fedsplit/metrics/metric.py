"""Metrics: functions of the logits and the labels of held-out text, reported beside the loss.

Shapes: B sequences of T predicted positions, V tokens in the vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.demands import further_of, invented
from fedsplit.errors import SettingError
from fedsplit.loading import OWN, Kind, described, make, name_of, options_by_name
from fedsplit.model.kernels import IGNORED

METRICS = {
    "preference_accuracy": "fedsplit.metrics.preference:PreferenceAccuracy",
    "preference_margin": "fedsplit.metrics.preference:PreferenceMargin",
    "token_accuracy": "fedsplit.metrics.token_accuracy:TokenAccuracy",
}
"""Modules and classes of metrics, by the names for `--metric`."""

METRIC = Kind("metric", lambda: METRICS, f"{' | '.join(sorted(METRICS))}, {OWN}", functions=True)
"""Metrics, for `--metric`."""


class Metric(Protocol):
    """A mean over held-out text: over tokens, sequences, or anything else that can be counted.

    Example:
        >>> class Confidence:  # mean probability of the likeliest token
        ...     def __call__(self, logits, labels):
        ...         likeliest = logits.softmax(-1).amax(-1)[labels != -100]
        ...         return float(likeliest.sum()), float(len(likeliest))
        >>> logits = torch.zeros(1, 2, 4)  # four equally likely tokens
        >>> Confidence()(logits, torch.tensor([[3, -100]]))
        (0.25, 1.0)
    """

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[float, float]:
        """Returns the sum and the count of a batch.

        A client's metric is the sum over all batches of the client, divided by the sum of the counts. The metric of a
        round is the same over all clients. A batch with nothing to measure has the count 0.

        Args:
            logits: (B, T, V) in float32, aligned with the labels; (B, C) for a classifier.
            labels: Tokens (B, T), -100 for positions without a prediction (a prompt, padding, a virtual token); classes
                (B,) for a classifier.
            *args: Nothing.
            **kwargs: The further arguments that the signature asks for, as for an objective: `mask` and `reference`.
        """
        ...


class MetricFailed(Exception):
    """A metric raised an error, or returned no sum and count. The message names the metric and the reason."""


class _Checked:
    """A metric with a check of each result.

    Attributes:
        further: Names of the further arguments that the metric asks for.
    """

    def __init__(self, name: str, metric: Metric) -> None:
        """Takes the metric, and a name for messages.

        Raises:
            SettingError: The metric needs something that a split cannot give.
        """
        self.further = further_of(metric, "metric", name)
        self._name = name
        self._metric = metric

    def __call__(self, logits: Tensor, labels: Tensor, /, **further: Tensor) -> tuple[float, float]:
        """Returns sum and count.

        Raises:
            MetricFailed: The metric raised an error, or returned no sum and count.
        """
        try:
            returned: Any = self._metric(logits, labels, **further)
        except (Exception, SystemExit) as error:
            raise MetricFailed(f"the metric {self._name} failed: {described(error)}") from error
        try:
            total, count = (float(value) for value in returned)
        except (TypeError, ValueError, RuntimeError):
            words = f"{_shown(returned)}, not a sum and a count"
            raise MetricFailed(f"the metric {self._name} returned {words}") from None
        if math.isfinite(total) and 0 <= count < math.inf:
            return total, count
        if bool(torch.isfinite(logits).all()):
            raise MetricFailed(f"the metric {self._name} returned {total:g} as its sum and {count:g} as its count")
        return 0.0, 0.0  # logits that are not finite are no fault of the metric: training has diverged


def _shown(value: object) -> str:
    """Returns a short text about a wrong result, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor with the shape {tuple(value.shape)}"
    if value is None or isinstance(value, int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def load_metrics(
    specs: Sequence[str],
    defaults: Mapping[str, Any],
    objects: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Metric]:
    """Makes metrics by name.

    Args:
        specs: Names of metrics: a key of `METRICS`, `path/to/mine.py:mine`, or `module:Class`. A function is used
            directly, and a class is called.
        defaults: Keyword arguments for classes with parameters of these names.
        objects: Metrics as objects, by name.
        options: Keyword arguments from the user, by NAME.KEY.

    Returns:
        The metrics by short name, for reports.

    Raises:
        SettingError: A metric does not exist or does not take the options, or two metrics have the same short name.

    Example:
        >>> metrics = load_metrics(["token_accuracy"], {})
        >>> metrics["token_accuracy"](torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 0]]))
        (1.0, 2.0)
    """
    metrics: dict[str, Metric] = {}
    by_name = options_by_name(METRIC, specs, options or {})
    for spec in specs:
        name = name_of(spec)
        keywords = by_name[name]
        if objects and spec in objects:
            for key, value in keywords.items():
                raise SettingError(f"metric.{name}.{key}", value, "no option, since the metric is an object")
            metric = objects[spec]
        else:
            metric = make(METRIC, spec, keywords, defaults, f"metric.{name}")
        if not callable(metric):
            raise SettingError("metric", spec, "a function of logits and labels, or a class with a method __call__")
        if name in metrics:
            raise SettingError("metric", ",".join(specs), f"metrics of different names; two are named {name}")
        metrics[name] = _Checked(spec, metric)
    return metrics


def try_metrics(
    metrics: Mapping[str, Metric],
    specs: Sequence[str],
    outputs: int,
    classifies: bool,
) -> None:
    """Calls each metric once on invented logits, so that mistakes show before a run begins.

    Args:
        metrics: Metrics by name.
        specs: Names in the setting, in the same order.
        outputs: Number of tokens in the vocabulary, or number of classes.
        classifies: True if labels are classes of sequences.

    Raises:
        SettingError: A metric failed.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, outputs) if classifies else (2, 4, outputs)
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(outputs, shape[:-1], generator=generator)
    if not classifies:
        labels[0, :1] = IGNORED  # like a prompt
        labels[1, 3:] = IGNORED  # like padding
    for spec, metric in zip(specs, metrics.values(), strict=True):
        further = invented(asked_by(metric), logits, labels, generator)
        try:
            metric(logits.clone(), labels.clone(), **further)  # copies, since a metric may change its arguments
        except MetricFailed as error:
            raise SettingError("metric", spec, f"a metric that works ({error}, on a trial)") from error


def asked_by(*metrics: Metric) -> frozenset[str]:
    """Returns the names of the further arguments that metrics ask for. A metric that was not loaded asks for none.

    Example:
        >>> asked_by(*load_metrics(["token_accuracy"], {}).values())
        frozenset()
    """
    names = [getattr(metric, "further", ()) for metric in metrics]
    return frozenset[str]().union(*names)


def measure(
    metrics: Mapping[str, Metric],
    logits: Tensor,
    labels: Tensor,
    further: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[float, float]]:
    """Returns each metric's sum and count over a batch.

    Args:
        metrics: Metrics by name.
        logits: Logits, aligned with the labels.
        labels: Labels.
        further: All further arguments that the metrics ask for, by name.

    Example:
        >>> metrics = load_metrics(["token_accuracy"], {})
        >>> measure(metrics, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0]]))
        {'token_accuracy': (1.0, 1.0)}
    """
    sums = {}
    for name, metric in metrics.items():
        arguments = {argument: (further or {})[argument] for argument in asked_by(metric)}
        sums[name] = metric(logits, labels, **arguments)
    return sums
