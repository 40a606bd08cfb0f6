"""`python -m fedsplit.evaluate`: measures a finished run's model on text, against the base model without its adapter.

All measurements use the unsplit model: whoever evaluates a finished run holds all of it.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, SettingError
from fedsplit.loading import OBJECT, name_of
from fedsplit.results.finished import Adapter, Run, open_run
from fedsplit.scores import Score, means, pooled
from fedsplit.settings.config import SETTINGS, Config
from fedsplit.settings.documents import build, from_document
from fedsplit.settings.flags import Parser, add_setting, flag_of, options_of
from fedsplit.settings.sections import DataSettings
from fedsplit.settings.validators import DEVICE

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedsplit.corpora.sequences import Sequences
    from fedsplit.metrics.metric import Metric


Texts = list[tuple[str, list["Sequences"]]]
"""Names of clients or owners, each with batches of text."""

NOT_INHERITED = ("data.config", "data.split")
"""Settings that belong to a data set. For a new data set, the plain defaults hold, and not the run's values."""

READING = tuple(name for name in SETTINGS if name.startswith("data.") and name not in ("data.held_out", "data.show"))
"""Settings for reading a new data set."""


@dataclass(frozen=True)
class Result:
    """Measurements on the text of one client or owner.

    Attributes:
        name: Name of the client or owner.
        base: Score of the base model.
        tuned: Score of the base model with the adapter.
    """

    name: str
    base: Score
    tuned: Score


def held_out_loss(model: Any, run: str | Path, clients: Collection[int] | None = None) -> float:
    """Returns the loss of an unsplit model on the held-out text of a finished run's clients.

    The loss of the run's model is `eval_loss.after` in the summary.

    Args:
        model: A causal LM, or a classifier after a run with classes; for example the base model with the run's adapter,
            opened by PEFT.
        run: Folder of the run.
        clients: Numbers of the clients with text that counts, such as the client of a personal adapter; None for all.

    Returns:
        Mean loss over all predicted tokens, or sequences, in nats.
    """
    from fedsplit.model.families import read_facts, read_pad
    from fedsplit.model.sources import config_folder
    from fedsplit.results.whole import score

    text = (Path(run) / "config.toml").read_text(encoding="utf-8")
    config = from_document(tomllib.loads(text))
    model.eval()
    if config.data.format == "classification":  # transformers finds the last token of a sequence by the padding token
        path = config_folder(config.model)
        model.config.pad_token_id = read_pad(path, read_facts(path).end)

    scores = []
    for client, (_, batches) in enumerate(_held_out(config, config.eval.samples)):
        if clients is None or client in clients:
            scores.append(score(model, batches))
    return pooled(scores).loss  # over all tokens: a client with more text counts more, as in the run


def _held_out(config: Config, samples: int) -> Texts:
    """Returns each client's held-out text, in the same batches as in the run's evaluations."""
    from fedsplit.client.heldout import held_out_batches
    from fedsplit.corpora.partition import shards_of

    texts = []
    for shard in shards_of(config):
        numbered = held_out_batches(shard, samples, config.train.batch_size)
        texts.append((shard.name, [rows for _, rows in numbered]))
    return texts


def other_data(config: Config, given: Mapping[str, object]) -> DataSettings:
    """Returns the settings for reading a new data set: the given values, and otherwise the run's values.

    Args:
        config: Settings of the run.
        given: Values of some of the settings in `READING`, by dotted name.

    Raises:
        SettingError: A value is not allowed.

    Example:
        >>> run = Config(data=DataSettings(text="body", split="test"))
        >>> data = other_data(run, {"data.owner": "who"})
        >>> data.text, data.owner, data.split
        ('body', 'who', 'train')
    """
    given_data = build(given).data
    plain = DataSettings()
    # A separate held-out file belongs to the run's data set, and all text of the new data set counts anyway.
    data = replace(config.data, held_out=plain.held_out, show=plain.show)
    names = {name.removeprefix("data.") for name in (*NOT_INHERITED, *given)}
    return replace(data, **{name: getattr(given_data, name) for name in names})


def _check_format(config: Config, data: DataSettings) -> None:
    """Checks that the format of a new data set suits the run's model.

    Raises:
        SettingError: The model predicts tokens and the data set has classes, or the other way round.
    """
    classifies = config.data.format == "classification"
    if classifies and data.format != "classification":
        raise SettingError("data.format", data.format, "classification, since the run's model tells classes")
    if not classifies and data.format == "classification":
        allowed = "auto | text | completion | chat, since the run's model predicts tokens"
        raise SettingError("data.format", data.format, allowed)


def _other_text(config: Config, dataset: str, samples: int, data: DataSettings) -> Texts:
    """Returns all text of a new data set in batches, owner by owner."""
    from fedsplit.corpora.partition import all_text
    from fedsplit.corpora.shards import spread
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import config_folder

    _check_format(config, data)
    check_packing(data)
    check_dataset(dataset, data)
    path = config_folder(config.model)
    by_owner = all_text(
        dataset,
        config.train.max_length,
        model_path=path,
        end=read_facts(path).end,
        data=data,
        seed=config.seed,
        classes=_classes(config),
    )

    texts = []
    for owner, sequences in by_owner.items():
        chosen = spread(sequences, samples or len(sequences))
        texts.append((owner, chosen.split(config.train.batch_size)))
    return texts


def _assignments(
    run: Run, dataset: str, client: int | None, samples: int, data: DataSettings
) -> list[tuple[Adapter, Texts]]:
    """Returns the adapters to measure, each with the texts for the measurement.

    Raises:
        InputError: The run has no such client; or a new data set is given, and clients have personal adapters.
    """
    if client is not None and not 0 <= client < run.config.clients:
        raise SettingError("client", client, f"0 to {run.config.clients - 1}, the clients of the run")
    if dataset:
        if client is None:
            run.check_shared()  # otherwise there is no saying which personal adapter is meant
        adapter = run.adapter(client if run.personal else None)
        return [(adapter, _other_text(run.config, dataset, samples, data))]

    texts = _held_out(run.config, samples or run.config.eval.samples)
    chosen = [number for number in range(len(texts)) if client is None or number == client]
    if run.personal:
        return [(run.adapter(number), [texts[number]]) for number in chosen]
    return [(run.adapter(), [texts[number] for number in chosen])]


def _check_tokens(run: Run, assignments: list[tuple[Adapter, Texts]]) -> None:
    """Checks that the model's embedding has a row for every token of the texts.

    Raises:
        SettingError: A token has no row. (On a GPU, an index beyond the embedding would end the process.)
    """
    from fedsplit.model.sources import config_folder
    from fedsplit.model.token_ids import check_largest

    largest = 0
    for _, texts in assignments:
        for _, batches in texts:
            for rows in batches:
                largest = max(largest, int(rows.ids.max()))
    check_largest(config_folder(run.config.model), run.config.model, largest)


def evaluate(
    run: Run,
    dataset: str = "",
    client: int | None = None,
    samples: int = 0,
    data: DataSettings | None = None,
    device: str = "cpu",
    tell: Callable[[str, int, int], object] = lambda text, done, of: None,
    metrics: Mapping[str, Metric] | None = None,
) -> list[Result]:
    """Measures a finished run's model, and the base model for comparison.

    Args:
        run: The run.
        dataset: A new data set, in the form of `fedsplit.simulate --dataset`. All text of the data set counts. Empty
            for the held-out text of the run's clients.
        client: Number of a single client, for this client's text or personal adapter; None for all clients.
        samples: Largest number of sequences of a client or owner; 0 for as many as in the run, or for all sequences of
            a new data set.
        data: Settings for reading a new data set; None for the run's settings (see `other_data`).
        device: Device to compute on, in the form of the setting `device`.
        tell: Function called before each measurement, with a description, the number done and the number of all.
        metrics: Metrics by name; None for no metrics. See `metrics_of`.

    Returns:
        A result for every client, or for every owner of a new data set.

    Raises:
        InputError: The client, data set, device or model does not exist.
    """
    from fedsplit.model.devices import check_device, resolve

    check_device("device", device)
    data = data or other_data(run.config, {})
    assignments = _assignments(run, dataset, client, samples, data)
    _check_tokens(run, assignments)

    classes = _classes(run.config)
    measurement = _Measurement(
        device=resolve(device),
        classes=len(classes),
        seed=run.config.seed,
        metrics=metrics or {},
        total=2 * sum(len(texts) for _, texts in assignments),
        tell=tell,
    )
    return measurement.results(assignments)


@dataclass
class _Measurement:
    """A series of measurements on one base model.

    Attributes:
        device: Device to compute on.
        classes: Number of classes; 0 for a model that predicts tokens.
        seed: Seed of the run, for the initial head of a classifier.
        metrics: Metrics by name.
        total: Number of all measurements.
        tell: Function called before each measurement, as for `evaluate`.
        done: Number of finished measurements.
    """

    device: torch.device
    classes: int
    seed: int
    metrics: Mapping[str, Metric]
    total: int
    tell: Callable[[str, int, int], object]
    done: int = 0

    def results(self, assignments: Sequence[tuple[Adapter, Texts]]) -> list[Result]:
        """Measures the base model without and with each adapter, on the texts of the adapter."""
        from fedsplit.results.fitting import leaves_base
        from fedsplit.results.whole import attach, detach, restore_head

        results = []
        base = self._open_base(assignments[0][0])
        for number, (adapter, texts) in enumerate(assignments, 1):
            base_scores = [self._score(base, "base model", name, batches) for name, batches in texts]
            model = attach(base, adapter)
            for (name, batches), base_score in zip(texts, base_scores, strict=True):
                tuned_score = self._score(model, "with the adapter", name, batches)
                results.append(Result(name, base_score, tuned_score))

            if number < len(assignments):  # the next adapter needs the base model again
                base = detach(model) if leaves_base(adapter) else self._open_base(adapter)
                if self.classes:  # PEFT leaves the adapter's head in the model
                    restore_head(base, self.seed)
        return results

    def _open_base(self, adapter: Adapter) -> PreTrainedModel:
        from fedsplit.results.whole import open_held

        return open_held(adapter, self.device, classes=self.classes, seed=self.seed)

    def _score(
        self, model: PreTrainedModel | PeftModel, description: str, name: str, batches: Sequence[Sequences]
    ) -> Score:
        from fedsplit.results.whole import score

        self.tell(f"{description}, text of {name}", self.done, self.total)
        self.done += 1
        return score(model, batches, self.metrics)


def _classes(config: Config) -> tuple[str, ...]:
    """Returns the names of a run's classes, or nothing for a model that predicts tokens."""
    if config.data.format != "classification":
        return ()
    from fedsplit.corpora.partition import partition_of

    return partition_of(config).classes  # from the data: an adapter's file has the number of classes only


def metrics_of(config: Config, specs: Sequence[str], options: Mapping[str, Any]) -> tuple[dict[str, Metric], list[str]]:
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
    replaced = {name_of(spec) for spec in specs}
    chosen = [spec for spec in config.metric if name_of(spec) not in replaced]
    names = {name_of(spec) for spec in (*chosen, *specs)}
    for key, value in options.items():
        if _metric_of(key) not in names:
            allowed = f"an option of {' | '.join(sorted(names))}" if names else "no option without --metric"
            raise SettingError(f"metric.{key}", value, allowed)

    merged: dict[str, Any] = {}
    for key, value in config.metric_options.items():
        if _metric_of(key) not in replaced:
            merged[key] = value
    merged |= options

    loaded: dict[str, Metric] = {}
    left_out = []
    for spec in (*chosen, *specs):
        try:
            loaded |= _load_metric(config, spec, merged)
        except SettingError as error:
            if spec in specs:
                raise
            left_out.append(f"without the run's metric {name_of(spec)}: {error}")
    return loaded, left_out


def _metric_of(key: str) -> str:
    """Returns the short name of the metric in the key of an option, NAME.KEY."""
    return key.partition(".")[0]


def _load_metric(config: Config, spec: str, options: Mapping[str, Any]) -> dict[str, Metric]:
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
    )
    measures = load_measures(alone)
    check_measures(alone, measures, len(_classes(config)))
    _, metrics = measures
    return metrics


def lines(results: Sequence[Result], classifies: bool = False) -> list[str]:
    """Returns results as the lines of a table, with the total in the last line.

    Args:
        results: One result or more.
        classifies: True if the model predicts the classes of texts, False if the model predicts tokens.

    Example:
        >>> result = Result("ann", base=Score(20.0, 10, 1), tuned=Score(10.0, 10, 4))
        >>> for line in lines([result], classifies=True):
        ...     print(line)
             texts              loss          accuracy
        ann     10  2.0000 -> 1.0000  10.00% -> 40.00%
        all     10  2.0000 -> 1.0000  10.00% -> 40.00%
    """
    from fedsplit.report import aligned, perplexity

    total = Result(
        name="all",
        base=pooled(result.base for result in results),
        tuned=pooled(result.tuned for result in results),
    )
    names = list(total.tuned.metrics)
    head = ["", "tokens", "loss", "perplexity", "accuracy"]
    if classifies:
        head = ["", "texts", "loss", "accuracy"]
    rows: list[tuple[str, ...]] = [(*head, *names)]
    for result in (*results, total):
        before = result.base
        after = result.tuned
        row = [result.name, f"{after.tokens:,}", f"{before.loss:.4f} -> {after.loss:.4f}"]
        if not classifies:  # of classes, the perplexity says little
            row.append(f"{perplexity(before.loss):.2f} -> {perplexity(after.loss):.2f}")
        row.append(f"{before.accuracy:.2%} -> {after.accuracy:.2%}")
        means_before = means(before.metrics)
        means_after = means(after.metrics)
        row += [f"{_mean(means_before[name])} -> {_mean(means_after[name])}" for name in names]
        rows.append(tuple(row))
    return aligned(rows)


def _mean(value: float | None) -> str:
    """Returns the mean of a metric as the table shows it; a dash for a mean of nothing."""
    return "-" if value is None else f"{value:.4f}"


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


def _given(flags: argparse.Namespace) -> dict[str, object]:
    """Returns the given settings for a new data set.

    Raises:
        SettingError: A setting is given without a data set.
    """
    given = {name: value for name, value in vars(flags).items() if name in READING}
    if given and not flags.dataset:
        name, value = next(iter(given.items()))
        allowed = f"no {flag_of(name)} without --dataset: what the clients held out is read as the run read it"
        raise SettingError(name, str(value), allowed)
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        parser = make_parser()
        flags, rest = parser.parse_known_args(argv)
        collector = ErrorCollector()
        with collector.collecting():
            options = build({}, metric_options=options_of(rest, parser, ["metric"])["metric"]).metric_options
        if flags.samples < 0:
            collector.extend([SettingError("samples", flags.samples, "a whole number of at least 0")])
        if not DEVICE.test(flags.device):
            collector.extend([SettingError("device", flags.device, DEVICE.words)])
        with collector.collecting():
            given = _given(flags)
        with collector.collecting():
            run = open_run(Path(flags.run))
        collector.check()

        if flags.model:  # the run's settings may name a folder of a machine that is gone
            run = replace(run, config=replace(run.config, model=flags.model))
        data = other_data(run.config, given)
        quieten(offline=not flags.dataset)  # the run's data may be in the Hub's cache; a new data set may not be
        further = getattr(flags, "metric", [])
        metrics, left_out = metrics_of(run.config, build({"metric": further}).metric, options)

        from fedsplit.events.screen import make_screen

        with make_screen(errors=True) as screen:
            results = evaluate(
                run,
                dataset=flags.dataset,
                client=flags.client,
                samples=flags.samples,
                data=data,
                device=flags.device,
                tell=screen.phase,
                metrics=metrics,
            )
        classifies = run.config.data.format == "classification"
        print(*lines(results, classifies), *left_out, sep="\n")

    return exit_code(work, argv)
