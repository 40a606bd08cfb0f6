"""Measures a finished run's model on text, and the base model for comparison.

All measurements use the unsplit model: whoever measures a finished run holds all of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.loading import OBJECT
from fedsplit.results.finished import Adapter, Run
from fedsplit.scores import Score, pooled
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build, from_document
from fedsplit.settings.sections import DataSettings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedsplit.corpora.sequences import Sequences
    from fedsplit.metrics.metric import Metric
    from fedsplit.objectives.objective import Objective

Texts = list[tuple[str, list["Sequences"]]]
"""Names of clients or owners, each with batches of text."""

NOT_INHERITED = ("data.config", "data.split")
"""Settings that belong to a data set. For a new data set, the plain defaults hold, and not the run's values."""


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

    Raises:
        InputError: The clients' text is at sites of their own; or the run's objective needs another model.
    """
    # Imported in the functions of this module, so that a command's `--help` and checks answer without torch.
    from fedsplit.model.facts import read_facts, read_pad
    from fedsplit.model.sources import config_folder
    from fedsplit.results.whole import score

    text = (Path(run) / "config.toml").read_text(encoding="utf-8")
    config = from_document(tomllib.loads(text))
    # A model from a training loop of the user's may have its dropout on.
    model.eval()
    if config.data.format == "classification":
        # transformers finds the last token of a sequence by the padding token.
        path = config_folder(config.model)
        model.config.pad_token_id = read_pad(path, read_facts(path).end)

    objective = _objective_of_pairs(config, config.data)
    if objective is not None and not hasattr(model, "disable_adapter"):
        needed = "a model of PEFT's with the adapter attached, after a run on pairs: they are compared with its base"
        raise InputError(f"held_out_loss takes {needed}")
    scores = []
    for client, (_, batches) in enumerate(_held_out(config, config.eval.samples)):
        if clients is None or client in clients:
            scores.append(score(model, batches, objective=objective))
    return pooled(scores).loss  # over all tokens: a client with more text counts more, as in the run


def _held_out(config: Config, samples: int) -> Texts:
    """Returns each client's held-out text, in the same batches as in the run's evaluations.

    Raises:
        SettingError: The text is at the clients' sites. What the settings name here is another data set.
    """
    if config.data.at == "site":
        allowed = "another data set, since the run's held-out text is at its sites; summary.json has the losses"
        raise SettingError("dataset", "the run's own", allowed)
    from fedsplit.client.heldout import held_out_batches
    from fedsplit.corpora.partition import shards_of

    texts = []
    for shard in shards_of(config):
        numbered = held_out_batches(shard, samples, config.train.batch_size, _rows_together(config.data))
        texts.append((shard.name, [rows for _, rows in numbered]))
    return texts


def _rows_together(data: DataSettings) -> int:
    """Returns the number of sequences that are not divided: 2 for pairs."""
    return 2 if data.format == PAIRS else 1


def _objective_of_pairs(config: Config, data: DataSettings) -> Objective | None:
    """Returns the objective of a run, if the data are pairs; otherwise None. Other text is measured by cross-entropy.

    Args:
        config: Settings of the run.
        data: Settings for reading the data.

    Raises:
        SettingError: The objective can no longer be made.
    """
    from fedsplit.client.measures import load_objective_of

    if data.format != PAIRS:
        return None
    if config.objective.endswith(OBJECT):
        raise SettingError("objective", config.objective, "a name; this objective was an object of a program")
    return load_objective_of(config)


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


def check_other_data(config: Config, dataset: str, data: DataSettings) -> None:
    """Checks that a new data set can exist and that its format suits the run's model, without reading the data.

    Args:
        config: Settings of the run.
        dataset: The new data set, in the form of `fedsplit.simulate --dataset`.
        data: Settings for reading it.

    Raises:
        InputError: The data set cannot exist; or the model predicts tokens and the data set has classes, or the other
            way round. All errors are reported together.
    """
    from fedsplit.corpora.tables import check_dataset, check_packing

    collector = ErrorCollector()
    with collector.collecting():
        _check_format(config, data)
    with collector.collecting():
        check_packing(data)
    with collector.collecting():
        check_dataset(dataset, data)
    collector.check()


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
    if data.format == PAIRS != config.data.format:
        allowed = "auto | text | completion | chat, since the run was not trained on pairs"
        raise SettingError("data.format", data.format, allowed)


def _other_text(config: Config, dataset: str, samples: int, data: DataSettings) -> Texts:
    """Returns all text of a new data set in batches, owner by owner."""
    from fedsplit.corpora.partition import all_text
    from fedsplit.corpora.shards import spread_examples
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder

    path = config_folder(config.model)
    by_owner = all_text(
        dataset,
        config.train.max_length,
        model_path=path,
        end=read_facts(path).end,
        data=data,
        seed=config.seed,
        classes=classes_of(config),
    )

    texts = []
    for owner, sequences in by_owner.items():
        chosen = spread_examples(sequences, samples or len(sequences), _rows_together(data))
        texts.append((owner, chosen.split(config.train.batch_size)))
    return texts


def check_client(run: Run, client: int | None, dataset: str = "") -> None:
    """Checks that a run has a client, and that there is no doubt which adapter is to be measured on a new data set.

    Args:
        run: The run.
        client: Number of the client; None for all clients.
        dataset: A new data set; empty for the held-out text of the run's clients.

    Raises:
        InputError: The run has no such client; or a new data set is given, no client is named, and clients have
            personal adapters.
    """
    if client is not None and not 0 <= client < run.config.clients:
        raise SettingError("client", client, f"0 to {run.config.clients - 1}, the clients of the run")
    if dataset and client is None:
        run.check_shared()


def _assignments(
    run: Run, dataset: str, client: int | None, samples: int, data: DataSettings
) -> list[tuple[Adapter, Texts]]:
    """Returns the adapters to measure, each with the texts for the measurement.

    Raises:
        InputError: The run has no such client; or a new data set is given, and clients have personal adapters.
    """
    check_client(run, client, dataset)
    if dataset:
        check_other_data(run.config, dataset, data)
        adapter = run.adapter(client if run.personal else None)
        return [(adapter, _other_text(run.config, dataset, samples, data))]

    texts = _held_out(run.config, samples or run.config.eval.samples)
    clients = range(len(texts)) if client is None else [client]
    if run.personal:
        return [(run.adapter(number), [texts[number]]) for number in clients]
    shared = run.adapter()
    return [(shared, [texts[number] for number in clients])]


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


def _say_nothing(text: str, done: int, total: int) -> None:
    """Default of `tell` for `evaluate`."""


def evaluate(
    run: Run,
    dataset: str = "",
    client: int | None = None,
    samples: int = 0,
    data: DataSettings | None = None,
    device: str = "cpu",
    tell: Callable[[str, int, int], object] = _say_nothing,
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

    classes = classes_of(run.config)
    measurement = _Measurement(
        device=resolve(device),
        classes=len(classes),
        seed=run.config.seed,
        metrics=metrics or {},
        objective=_objective_of_pairs(run.config, data),
        total=2 * sum(len(texts) for _, texts in assignments),  # with and without the adapter
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
        objective: Objective over pairs, for pairs; None for cross-entropy.
        total: Number of all measurements.
        tell: Function called before each measurement, as for `evaluate`.
        done: Number of finished measurements.
    """

    device: torch.device
    classes: int
    seed: int
    metrics: Mapping[str, Metric]
    objective: Objective | None
    total: int
    tell: Callable[[str, int, int], object]
    done: int = 0

    def results(self, assignments: Sequence[tuple[Adapter, Texts]]) -> list[Result]:
        """Measures the base model without and with each adapter, on the texts of the adapter."""
        from fedsplit.results.fitting import leaves_base
        from fedsplit.results.whole import attach, detach, restore_head

        results = []
        first_adapter, _ = assignments[0]
        base = self._open_base(first_adapter)
        for number, (adapter, texts) in enumerate(assignments, 1):
            # All texts with the bare base first: attaching an adapter changes the base model in place.
            base_scores = [self._score(base, "base model", name, batches) for name, batches in texts]
            model = attach(base, adapter)
            for (name, batches), base_score in zip(texts, base_scores, strict=True):
                tuned_score = self._score(model, "with the adapter", name, batches)
                results.append(Result(name, base_score, tuned_score))

            if number == len(assignments):
                break
            # The next adapter needs the base model again. To detach is faster than to open, but not always possible.
            base = detach(model) if leaves_base(adapter) else self._open_base(adapter)
            if self.classes:  # PEFT leaves the adapter's head in the model
                restore_head(base, self.seed)
        return results

    def _open_base(self, adapter: Adapter) -> PreTrainedModel:
        """Opens the base model of an adapter's run, on the device of the measurement."""
        from fedsplit.results.whole import open_held

        return open_held(adapter, self.device, classes=self.classes, seed=self.seed)

    def _score(
        self, model: PreTrainedModel | PeftModel, description: str, name: str, batches: Sequence[Sequences]
    ) -> Score:
        """Reports a measurement by `tell`, and makes it.

        Args:
            model: The model, with or without an adapter.
            description: Words about the model.
            name: Name of the client or owner.
            batches: Text of the client or owner.
        """
        from fedsplit.results.whole import score

        self.tell(f"{description}, text of {name}", self.done, self.total)
        self.done += 1
        return score(model, batches, self.metrics, self.objective)


def classes_of(config: Config) -> tuple[str, ...]:
    """Returns the names of a run's classes, or nothing for a model that predicts tokens."""
    if config.data.format != "classification":
        return ()
    from fedsplit.corpora.partition import partition_of

    return partition_of(config).classes  # from the data: an adapter's file has the number of classes only
