"""A run's objective and metrics: loaded at every client by the settings, and tried before the run begins."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from fedsplit.adaptation.methods import method_of
from fedsplit.demands import REFERENCE
from fedsplit.errors import SettingError, check_all
from fedsplit.loading import name_of
from fedsplit.metrics.metric import Metric, asked_by, load_metrics, try_metrics
from fedsplit.metrics.preference import PREFERENCE
from fedsplit.model.sources import config_folder
from fedsplit.model.token_ids import embedding_rows
from fedsplit.objectives.objective import Demands, Objective, demands_of, load_objective, try_objective
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.choices import PAIRS
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
    metrics = load_metrics(metrics_of(config), _defaults(config), objects.metrics, metric_options_of(config))
    return load_objective_of(config, objects), metrics


def load_objective_of(config: Config, objects: Objects = NOTHING) -> Objective | None:
    """Makes the objective in the settings; None for cross-entropy. For the arguments see `load_measures`.

    Raises:
        SettingError: The objective does not exist, or does not take the options.
    """
    return load_objective(config.objective, config.objective_options, _defaults(config), objects.objective)


def _defaults(config: Config) -> dict[str, str]:
    """Returns arguments for constructors that have parameters of these names."""
    return {"model": str(config_folder(config.model, weights=False))}


def metrics_of(config: Config) -> tuple[str, ...]:
    """Returns the names of a run's metrics: those in the settings, and on pairs accuracy and margin of the preference.

    Args:
        config: Configuration of the run, with the format of the data where it is `preference`.

    Example:
        >>> from fedsplit.settings.sections import DataSettings
        >>> metrics_of(Config(metric=("token_accuracy",), data=DataSettings(format="preference")))
        ('token_accuracy', 'preference_accuracy', 'preference_margin')
    """
    if config.data.format != PAIRS:
        return config.metric
    names = {name_of(spec) for spec in config.metric}
    return (*config.metric, *(name for name in PREFERENCE if name not in names))


def metric_options_of(config: Config) -> dict[str, Any]:
    """Returns the metrics' options by NAME.KEY. The margin of a preference has the objective's `beta`, where given."""
    options: dict[str, Any] = dict(config.metric_options)
    beta = config.objective_options.get("beta")
    if beta is not None and "preference_margin" in metrics_of(config):
        options = {"preference_margin.beta": beta, **options}  # the metric's own option wins
    return options


def check_pairs(config: Config, demands: Demands) -> None:
    """Checks the settings of a run whose objective is a mean over pairs: no pair may be divided.

    Args:
        config: Configuration of the run.
        demands: What the objective asks for.

    Raises:
        InputError: A batch, or the number of sequences, does not hold whole pairs. All errors are reported together.

    Example:
        >>> config = Config(objective="dpo")
        >>> check_pairs(config, demands_of(load_objective_of(config)))
    """
    if demands.mean_over == "pairs":
        check_all(_divided_pairs(config))


def _divided_pairs(config: Config) -> Iterator[SettingError]:
    """Yields an error for each number of sequences that does not hold whole pairs."""
    train = config.train
    reason = f"under the objective {config.objective}, which compares the two sequences of a pair"
    if train.batch_size % 2:
        yield SettingError("train.batch_size", train.batch_size, f"an even number {reason}")
    elif train.micro_batches > train.batch_size // 2:  # a micro-batch has a pair at least
        yield SettingError("train.micro_batches", train.micro_batches, f"0 to {train.batch_size // 2} {reason}")
    if train.samples % 2:
        yield SettingError("train.samples", train.samples, f"an even number {reason}")
    if config.eval.samples < 2:
        yield SettingError("eval.samples", config.eval.samples, f"2 or more {reason}")


def check_format(config: Config, measures: Measures, format: str) -> None:
    """Checks that the data have pairs exactly if the objective compares pairs.

    Args:
        config: Configuration of the run.
        measures: Result of `load_measures`.
        format: Format of the data.

    Raises:
        SettingError: The data have pairs and the objective compares none, or the other way round; or a metric compares
            pairs, and there are none.

    Example:
        >>> config = Config(objective="dpo")
        >>> check_format(config, load_measures(config), "preference")
    """
    objective, metrics = measures
    compares = demands_of(objective).mean_over == "pairs"
    if format == PAIRS and not compares:
        allowed = "dpo, or an objective whose mean_over is pairs, for data with chosen and rejected texts"
        raise SettingError("objective", config.objective, allowed)
    if format != PAIRS and compares:
        columns = f"columns {config.data.chosen} and {config.data.rejected}"
        allowed = f"one that compares no pairs, for data of the format {format}; pairs are in {columns}"
        raise SettingError("objective", config.objective, allowed)
    check_metrics(metrics, format)


def check_metrics(metrics: Collection[str], format: str) -> None:
    """Checks that no metric compares pairs where there are none.

    Args:
        metrics: Names of the metrics.
        format: Format of the data.

    Raises:
        SettingError: A metric compares pairs, and the data have none.

    Example:
        >>> check_metrics(["preference_margin"], "preference")
    """
    of_pairs = [name for name in metrics if name in PREFERENCE]
    if format != PAIRS and of_pairs:
        raise SettingError("metric", of_pairs[0], f"one that compares no pairs, for data of the format {format}")


def who_compares(config: Config, measures: Measures) -> tuple[str, str] | None:
    """Returns the setting and the name of the first objective or metric that asks for the base model's logits.

    Args:
        config: Configuration of the run.
        measures: Result of `load_measures`.

    Returns:
        Setting and name; None if nothing asks for the logits.

    Example:
        >>> config = Config(objective="distillation")
        >>> who_compares(config, load_measures(config))
        ('objective', 'distillation')
    """
    objective, metrics = measures
    if demands_of(objective).compares:
        return "objective", config.objective
    comparing = [name for name, metric in metrics.items() if REFERENCE in asked_by(metric)]
    return ("metric", comparing[0]) if comparing else None


def check_reference(config: Config, measures: Measures, folds: bool) -> None:
    """Checks that the base model is still there when an objective or a metric compares with it.

    Args:
        config: Configuration of the run.
        measures: Result of `load_measures`.
        folds: True if the strategy adds changes to base weights.

    Raises:
        InputError: The base weights change, or are not kept. All errors are reported together.

    Example:
        >>> config = Config(objective="distillation")
        >>> check_reference(config, load_measures(config), folds=False)
    """
    comparing = who_compares(config, measures)
    if comparing is not None:
        check_all(_without_base(config, *comparing, folds))


def _without_base(config: Config, setting: str, name: str, folds: bool) -> Iterator[SettingError]:
    """Yields an error for each setting under which the base weights change, or are not kept."""
    one = f"an {setting}" if setting == "objective" else f"a {setting}"
    allowed = f"{one} that does not ask for the reference, the base model's logits,"
    if folds:
        reason = f"under the strategy {config.strategy}, which adds what it learns to the base weights"
        yield SettingError(setting, name, f"{allowed} {reason}")
    if config.prompt.kind == "off" and method_of(config.lora).residual:
        reason = f"with adapters of the kind {config.lora.method}, which take their start out of the base weights"
        yield SettingError(setting, name, f"{allowed} {reason}")
    if config.lm_head == "full":
        yield SettingError(setting, name, f"{allowed} with --lm-head full, which trains the weights of the base's head")


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
    comparing = who_compares(config, measures)
    if classes and comparing is not None:
        setting, name = comparing
        reason = "where texts are sorted into classes: the base model has no head for them"
        raise SettingError(setting, name, f"one that does not ask for the reference {reason}")
    # The real width: a user's code may depend on the size of the vocabulary.
    outputs = classes or embedding_rows(config_folder(config.model))
    try_objective(objective, config.objective, outputs, bool(classes))
    try_metrics(metrics, metrics_of(config), outputs, bool(classes))
