"""A run's objective and metrics: loaded at every client by the settings, and tried before the run begins."""

from __future__ import annotations

from fedsplit.metrics.metric import Metric, load_metrics, try_metrics
from fedsplit.model.sources import config_folder
from fedsplit.model.token_ids import embedding_rows
from fedsplit.objectives.objective import Objective, load_objective, try_objective
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config

Measures = tuple[Objective | None, dict[str, Metric]]
"""A run's objective (None: cross-entropy), and the metrics by name."""


def load_measures(config: Config, objects: Objects = NOTHING) -> Measures:
    """Makes the objective and the metrics in the settings.

    A constructor with a parameter `model` gets the folder of the model's configuration and tokenizer.

    Args:
        config: Configuration of the run.
        objects: Objects in place of names in the settings.

    Returns:
        The objective (None: cross-entropy), and the metrics by name.

    Raises:
        SettingError: An objective or metric does not exist, or does not take the options.

    Example:
        >>> objective, metrics = load_measures(Config(metric=("token_accuracy",)))
        >>> objective is None, list(metrics)
        (True, ['token_accuracy'])
    """
    defaults = {"model": str(config_folder(config.model))}
    objective = load_objective(config.objective, config.objective_options, defaults, objects.objective)
    return objective, load_metrics(config.metric, defaults, objects.metrics, config.metric_options)


def check_measures(config: Config, measures: Measures, classes: int = 0) -> None:
    """Checks that the objective and the metrics work, by one call of each on invented logits.

    Args:
        config: Configuration of the run.
        measures: Result of `load_measures`.
        classes: Number of classes of the texts; 0 for a model that predicts tokens.

    Raises:
        SettingError: The objective or a metric does not work.

    Example:
        >>> config = Config(metric=("token_accuracy",))
        >>> check_measures(config, load_measures(config))
    """
    objective, metrics = measures
    # The real width: a user's code may depend on the size of the vocabulary.
    outputs = classes or embedding_rows(config_folder(config.model))
    try_objective(objective, config.objective, outputs, bool(classes))
    try_metrics(metrics, config.metric, outputs, bool(classes))
