"""A run's objective and metrics: loaded by its settings at every client, and tried before the run begins."""

from __future__ import annotations

from fedsplit.metrics.metric import Metric, load_metrics, try_metrics
from fedsplit.model.sources import config_folder
from fedsplit.model.token_ids import embedding_rows
from fedsplit.objectives.objective import Objective, load_objective, try_objective
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config

Measures = tuple[Objective | None, dict[str, Metric]]
"""A run's objective (None: cross-entropy), and its metrics by name."""


def load_measures(config: Config, objects: Objects = NOTHING) -> Measures:
    """Makes the objective (None: cross-entropy) and the metrics by name, as the settings name them.

    A class whose constructor takes `model` is given the folder of the model's configuration and tokenizer.

    Args:
        config: Configuration of the run.
        objects: Objects in place of names.

    Raises:
        SettingError: One is not there, or does not take its options.

    Example:
        >>> objective, metrics = load_measures(Config(metric=("token_accuracy",)))
        >>> objective is None, list(metrics)
        (True, ['token_accuracy'])
    """
    defaults = {"model": str(config_folder(config.model))}
    objective = load_objective(config.objective, config.objective_options, defaults, objects.objective)
    return objective, load_metrics(config.metric, defaults, objects.metrics, config.metric_options)


def check_measures(config: Config, measures: Measures, classes: int = 0) -> None:
    """Makes sure that the objective and the metrics work, by calling each once on invented logits.

    Args:
        config: The run's configuration.
        measures: What `load_measures` made of it.
        classes: Classes of the texts; 0 where tokens are predicted.

    Raises:
        SettingError: One does not work.
    """
    objective, metrics = measures
    outputs = classes or embedding_rows(config_folder(config.model))
    try_objective(objective, config.objective, outputs, bool(classes))
    try_metrics(metrics, config.metric, outputs, bool(classes))
