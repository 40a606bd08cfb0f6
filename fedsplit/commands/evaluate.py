"""`python -m fedsplit.evaluate`: measures a finished run's model on text, and the base model without the adapter."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, SettingError, UnknownValue, check_all
from fedsplit.loading import OBJECT, name_of
from fedsplit.results.finished import Run, open_run
from fedsplit.results.measuring import (
    NOT_INHERITED,
    Result,
    check_client,
    check_other_data,
    classes_of,
    evaluate,
    other_data,
)
from fedsplit.scores import means, pooled
from fedsplit.settings.chains import measures_exactly
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.command_line import Call, Parser
from fedsplit.settings.config import SETTINGS, Config
from fedsplit.settings.documents import build
from fedsplit.settings.flags import add_setting, flag_of
from fedsplit.settings.sections import DataSettings
from fedsplit.settings.validators import DEVICE

if TYPE_CHECKING:
    from fedsplit.metrics.metric import Metric

READING = tuple(name for name in SETTINGS if name.startswith("data.") and name not in ("data.held_out", "data.show"))
"""Settings for reading a new data set."""


def metrics_of(
    config: Config,
    specs: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[dict[str, Metric], list[str]]:
    """Makes the metrics of a run, and further metrics.

    Args:
        config: Settings of the run. A metric of the run that can no longer be made is left out.
        specs: Names of further metrics, in the form of `fedsplit.simulate --metric`. A further metric replaces a metric
            of the run with the same short name.
        options: Keyword arguments, by NAME.KEY. An option wins over the run's option.

    Returns:
        The metrics by name, and a line about each metric that is left out.

    Raises:
        SettingError: A further metric cannot be made, or an option is for no metric.

    Example:
        >>> metrics, left_out = metrics_of(Config(), ["token_accuracy"], {})
        >>> list(metrics), left_out
        (['token_accuracy'], [])
    """
    from fedsplit.client import measures

    replaced = {name_of(spec) for spec in specs}
    of_run = [spec for spec in measures.metrics_of(config) if name_of(spec) not in replaced]
    all_specs = [*of_run, *specs]

    names = sorted({name_of(spec) for spec in all_specs})
    for key, value in options.items():
        if _metric_of(key) not in names:
            allowed = f"an option of {' | '.join(names)}" if names else "no option without --metric"
            raise SettingError(f"metric.{key}", value, allowed)

    # The run's options for a replaced metric are dropped: the new metric may have other parameters.
    merged: dict[str, Any] = {}
    for key, value in measures.metric_options_of(config).items():
        if _metric_of(key) not in replaced:
            merged[key] = value
    merged |= options

    loaded: dict[str, Metric] = {}
    left_out = []
    for spec in all_specs:
        try:
            loaded |= _load_metric(config, spec, merged)
        except SettingError as error:
            # The file of a run's metric may be gone since the run. That is no error of this call.
            if spec in specs:
                raise
            left_out.append(f"without the run's metric {name_of(spec)}: {error}")
    return loaded, left_out


def _metric_of(key: str) -> str:
    """Returns the short name of the metric in the key of an option, NAME.KEY."""
    return key.partition(".")[0]


def _load_metric(
    config: Config,
    spec: str,
    options: Mapping[str, Any],
) -> dict[str, Metric]:
    """Makes a metric, and tries the metric on invented logits.

    Args:
        config: Settings of the run.
        spec: Name of the metric.
        options: Keyword arguments of all metrics, by NAME.KEY.

    Returns:
        The metric by short name.

    Raises:
        SettingError: The metric cannot be made, or does not work.
    """
    from fedsplit.client.measures import check_measures, load_measures

    if spec.endswith(OBJECT):
        raise SettingError("metric", spec, "a name; this metric was an object of a program")
    of_metric = {key: value for key, value in options.items() if _metric_of(key) == name_of(spec)}
    alone = replace(
        config,
        objective="cross_entropy",  # the file of the run's objective may be gone, and is not needed
        objective_options={},
        metric=(spec,),
        metric_options=of_metric,
        data=DataSettings(),  # pairs would bring metrics of their own
    )
    measures = load_measures(alone)
    check_measures(alone, measures, len(classes_of(config)))
    _, metrics = measures
    return metrics


def lines(
    results: Sequence[Result],
    classifies: bool = False,
    has_pairs: bool = False,
) -> list[str]:
    """Returns results as the lines of a table, with the total in the last line.

    Args:
        results: One result or more.
        classifies: True if the model predicts the classes of texts, False if the model predicts tokens.
        has_pairs: True if the model prefers one text of each pair. The metrics then have the accuracy.

    Example:
        >>> from fedsplit.scores import Score
        >>> result = Result("ann", base=Score(20.0, 10, 1), tuned=Score(10.0, 10, 4))
        >>> for line in lines([result], classifies=True):
        ...     print(line)
             texts              loss          accuracy
        ann     10  2.0000 -> 1.0000  10.00% -> 40.00%
        all     10  2.0000 -> 1.0000  10.00% -> 40.00%
    """
    from fedsplit.formatting import aligned, perplexity

    total = Result(
        name="all",
        base=pooled(result.base for result in results),
        tuned=pooled(result.tuned for result in results),
    )
    names = list(total.tuned.metrics)
    head = ["", "tokens", "loss", "perplexity", "accuracy"]
    if classifies:
        head = ["", "texts", "loss", "accuracy"]
    if has_pairs:
        head = ["", "pairs", "loss"]
    rows: list[tuple[str, ...]] = [(*head, *names)]
    for result in (*results, total):
        before = result.base
        after = result.tuned
        row = [result.name, f"{after.tokens:,}", f"{before.loss:.4f} -> {after.loss:.4f}"]
        if "perplexity" in head:  # the perplexity over a few classes, or of pairs, says little
            row.append(f"{perplexity(before.loss):.2f} -> {perplexity(after.loss):.2f}")
        if "accuracy" in head:
            row.append(f"{before.accuracy:.2%} -> {after.accuracy:.2%}")

        means_before = means(before.metrics)
        means_after = means(after.metrics)
        for name in names:
            row.append(f"{_mean(means_before[name])} -> {_mean(means_after[name])}")
        rows.append(tuple(row))
    return aligned(rows)


def _mean(value: float | None) -> str:
    """Returns the mean of a metric as the table shows it; a dash for a mean of nothing."""
    return "-" if value is None else f"{value:.4f}"


def codec_hint(config: Config) -> list[str]:
    """Returns a line that says why a run reported another loss, if a codec of the wire changed its hidden states.

    Example:
        >>> codec_hint(Config())
        []
        >>> codec_hint(build({"wire.codec": "int4"}))
        ['the run measured through the codec int4, and this command without a codec: the loss in summary.json differs']
    """
    crossing = dict.fromkeys(text for (kind, _), text in config.wire.codecs.items() if kind == "activation")
    lossy = [text for text in crossing if not measures_exactly(text)]
    if not lossy:
        return []
    codecs = f"the codec {lossy[0]}" if len(lossy) == 1 else f"the codecs {' and '.join(lossy)}"
    return [f"the run measured through {codecs}, and this command without a codec: the loss in summary.json differs"]


def make_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="python -m fedsplit.evaluate",
        description="Measures the perplexity and accuracy of a finished run's model: base model -> with the adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the folder of a finished run")
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="another data set, as fedsplit.simulate takes it; all its text counts, owner by owner "
        "(default: the held-out text of the run's clients)",
    )
    parser.add_argument(
        "--client", type=int, metavar="N", help="use this client alone, with its personal adapter if it has one"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="most sequences of each (default: as in the run, or all)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help=f"device to compute on: {DEVICE.words} (default: cpu)"
    )
    parser.add_argument("--model", default="", metavar="DIR", help="folder of the base model, if it was moved")
    add_setting(parser, "metric", "the run's")
    parser.epilog = "--metric.NAME.KEY VALUE sets a keyword argument of the metric called NAME."
    data = parser.add_argument_group("data", "Ways to read the other data set.")
    for name in READING:
        add_setting(data, name, None if name in NOT_INHERITED else "the run's")
    return parser


@dataclass(frozen=True)
class _Job:
    """A measurement, with all inputs checked.

    Attributes:
        flags: The flags.
        run: The run.
        data: Settings for reading a new data set.
        metrics: Metrics by name.
        left_out: A line about each metric of the run that can no longer be made.
    """

    flags: argparse.Namespace
    run: Run
    data: DataSettings
    metrics: Mapping[str, Metric]
    left_out: Sequence[str]


def _check(call: Call) -> _Job:
    """Checks all inputs before a model is loaded or a text is read.

    Raises:
        InputError: An input is wrong. All errors are reported together.
    """
    flags = call.flags
    collector = ErrorCollector()
    collector.extend(call.errors)
    with collector.collecting():
        # First without the run: these errors are reported even if the run cannot be opened.
        build({}, metric_options=call.options["metric"])
    with collector.collecting():
        if flags.samples < 0:
            raise SettingError("samples", flags.samples, "a whole number of at least 0")
    with collector.collecting():
        if not DEVICE.test(flags.device):
            raise SettingError("device", flags.device, DEVICE.words)
    # `vars`, since reading a refused flag would raise an error.
    given = {name: value for name, value in vars(flags).items() if name in READING}
    with collector.collecting():
        # For the errors in these settings alone.
        build(given)
    with collector.collecting():
        if not flags.dataset:
            _check_without_dataset(given)
    with collector.collecting():
        run = open_run(Path(flags.run))
        if flags.model:  # the run's settings may name a folder of a different machine
            run = replace(run, config=replace(run.config, model=flags.model))
        # The run has fetched its data. Only a new data set may have to be fetched.
        has_new_dataset = bool(vars(flags).get("dataset"))
        quieten(offline=not has_new_dataset)
        job = _check_against(run, call, given)
    collector.check()
    return job


def _check_against(run: Run, call: Call, given: Mapping[str, object]) -> _Job:
    """Checks the inputs that depend on the run.

    Args:
        run: The run.
        call: The command line.
        given: Settings for reading a new data set, by dotted name.

    Raises:
        InputError: An input does not fit the run. All errors are reported together.
    """
    from fedsplit.client.measures import check_metrics

    flags = call.flags
    collector = ErrorCollector()
    with collector.collecting():
        check_client(run, flags.client, flags.dataset)
    data = run.config.data
    with collector.collecting():
        data = other_data(run.config, given)
        if flags.dataset:
            check_other_data(run.config, flags.dataset, data)
    with collector.collecting():
        names = vars(flags).get("metric", [])
        further = build({"metric": names}, metric_options=call.options["metric"])
        # Reported already. Without its option, a metric is not the one that the user asked for.
        if "metric_options" in call.refused:
            raise UnknownValue("metric_options")
        measured = _without_pairs(run.config) if data.format != PAIRS else run.config
        metrics, left_out = metrics_of(measured, further.metric, further.metric_options)
        check_metrics(metrics, data.format)
    collector.check()
    return _Job(flags, run, data, metrics, left_out)


def _without_pairs(config: Config) -> Config:
    """Returns the settings of a run without the metrics of pairs, for text that has none.

    Example:
        >>> _without_pairs(Config(metric=("token_accuracy", "preference_margin"))).metric
        ('token_accuracy',)
    """
    from fedsplit.metrics.preference import PREFERENCE

    if config.data.format == PAIRS:
        config = replace(config, data=replace(config.data, format="auto"))
    return replace(config, metric=tuple(spec for spec in config.metric if spec not in PREFERENCE))


def _check_without_dataset(given: Mapping[str, object]) -> None:
    """Checks that no setting for reading a new data set is given, as there is no new data set.

    Raises:
        InputError: A setting is given. All errors are reported together.
    """
    why = "without --dataset: the clients' held-out text is read with the settings of the run"
    errors = [SettingError(name, str(value), f"no {flag_of(name)} {why}") for name, value in given.items()]
    check_all(errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        job = _check(make_parser().read(argv, ["metric"]))

        from fedsplit.events.screen import make_screen

        with make_screen(errors=True) as screen:
            results = evaluate(
                job.run,
                dataset=job.flags.dataset,
                client=job.flags.client,
                samples=job.flags.samples,
                data=job.data,
                device=job.flags.device,
                tell=screen.phase,
                metrics=job.metrics,
            )
        classifies = job.run.config.data.format == "classification"
        has_pairs = job.data.format == PAIRS
        hints = [] if job.flags.dataset else codec_hint(job.run.config)
        print(*lines(results, classifies, has_pairs), *job.left_out, *hints, sep="\n")

    return exit_code(work, argv)
