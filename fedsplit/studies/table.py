"""The results of a study as a tidy table: one row for each run, round, client, split and metric."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.durable import replacing
from fedsplit.settings.config import OPTIONS, SETTINGS, Config
from fedsplit.studies.study import VARIANT, Point, text_of

if TYPE_CHECKING:
    import pandas

ALL = "all"
"""Name of the client, in the table, for a value over all clients."""

TRAIN = "train"
"""Split of values that the clients measured as they trained."""

HELD_OUT = "held_out"
"""Split of values on held-out text."""

NO_SPLIT = ""
"""Split of values that no text was measured for, such as bytes."""

COLUMNS = ("round", "client", "split", "metric", "value")
"""Columns behind those of the run, its seed and its settings."""

Value = tuple[str, str, str, float | None]
"""Client, split, metric and value."""


@dataclass(frozen=True)
class FinishedRun:
    """A run of a study that has a result.

    Attributes:
        name: Name of the run's folder.
        label: Name of the run's point of the grid.
        seed: Seed of the run.
        folder: Folder of the run.
        config: Settings of the run.
        summary: Content of summary.json.
    """

    name: str
    label: str
    seed: int
    folder: Path
    config: Config
    summary: Mapping[str, Any]


def tidy(
    runs: Sequence[FinishedRun], columns: Sequence[str], points: Mapping[str, Point] | None = None
) -> pandas.DataFrame:
    """Returns all values that some runs have reported, one a row.

    Columns: `run` and `label`, `seed`, `variant` for a study with variants, the settings in `columns` by their dotted
    names (`settings.metric` for the setting `metric`), then:

    - `round`: 0 is before training.
    - `client`: Name of the client; `all` for a value over all clients.
    - `split`: "train", "held_out", or "" for values that no text was measured for.
    - `metric`: Such as "loss", "perplexity", "aggregation_error", "seconds" or "bytes.activation_up".
    - `value`: The value.

    Args:
        runs: The runs.
        columns: Settings that differ between the runs.
        points: Points of the study by label, which name the variants; None without variants.
    """
    import pandas

    variants = {label: point[VARIANT] for label, point in (points or {}).items() if VARIANT in point}
    by_column = {VARIANT: [variants[run.label] for run in runs]} if variants else {}
    for column in columns:
        name = f"settings.{column}" if column in COLUMNS else column
        by_column[name] = of_one_type([value_of(run.config, column) for run in runs])
    rows = []
    for number, run in enumerate(runs):
        settings = [cells[number] for cells in by_column.values()]
        for round, values in sorted(_by_round(run.folder).items()):
            rows += [(run.name, run.label, run.seed, *settings, round, *value) for value in values]
    names = ["run", "label", "seed", *by_column, *COLUMNS]
    # The type is set, since pandas would give a table without any number another type.
    return pandas.DataFrame(rows, columns=names).astype({"value": "float64"})


def of_one_type(cells: Sequence[Any]) -> list[Any]:
    """Returns the cells of a column, all as texts unless Parquet has a type for them. None stays None.

    Example:
        >>> of_one_type([4, "2,4"]), of_one_type([True, 2]), of_one_type([1, 0.5, None])
        (['4', '2,4'], ['true', '2'], [1, 0.5, None])
    """
    kinds = {type(cell) for cell in cells if cell is not None}
    is_plain = any(kinds <= plain for plain in ({bool}, {int, float}, {str}))
    # The integers of Parquet have 64 bits.
    is_large = any(isinstance(cell, int) and abs(cell) >= 2**63 for cell in cells)
    if is_plain and not is_large:
        return list(cells)
    return [None if cell is None else text_of(cell) for cell in cells]


def value_of(config: Config, column: str) -> Any:
    """Returns a setting's value as a cell: a list of several values as a text, an option that is not set as None.

    Example:
        >>> value_of(Config(), "lora.rank"), value_of(Config(), "strategy_options.mu")
        (8, None)
    """
    table, _, key = column.partition(".")
    if table in OPTIONS.values():
        return getattr(config, table).get(key)
    value = config.value_of(SETTINGS[column])
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else ",".join(map(str, value))


def _by_round(folder: Path) -> dict[int, list[Value]]:
    """Returns the values of a run by round. Of a round that was played again, the last values count."""
    readers = {"train": _trained, "evaluate": _evaluated, "aggregate": _aggregated, "cost": _cost}
    by_event: dict[tuple[int, str], list[Value]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] in readers:
            found = readers[event["event"]](event)
            known = [value for value in found if value[-1] is not None]
            by_event[event["round"], event["event"]] = known
    by_round: dict[int, list[Value]] = {}
    for (round, _), values in by_event.items():
        by_round.setdefault(round, []).extend(values)
    return by_round


def _trained(event: Mapping[str, Any]) -> Iterator[Value]:
    """Yields the values of the training of a round."""
    for metric in ("loss", "router_aux_loss", "learning_rate", "tokens", "seconds"):
        yield ALL, TRAIN, metric, event.get(metric)
    for client, loss in event["clients"].items():
        yield client, TRAIN, "loss", loss


def _evaluated(event: Mapping[str, Any]) -> Iterator[Value]:
    """Yields the values of the evaluation of a round."""
    for metric in ("loss", "perplexity", "accuracy", "tokens", "seconds"):
        yield ALL, HELD_OUT, metric, event.get(metric)
    for metric, value in (event.get("metrics") or {}).items():
        yield ALL, HELD_OUT, metric, value
    for client, loss in event["clients"].items():
        yield client, HELD_OUT, "loss", loss
    for metric, by_client in (event.get("client_metrics") or {}).items():
        for client, value in by_client.items():
            yield client, HELD_OUT, metric, value
    for client, nats in event["forgotten"].items():
        yield client, HELD_OUT, "forgotten", nats
    yield ALL, NO_SPLIT, "elapsed", event["elapsed"]


def _aggregated(event: Mapping[str, Any]) -> Iterator[Value]:
    """Yields the values of the aggregation of a round."""
    yield ALL, NO_SPLIT, "aggregation_error", event["error"]
    yield ALL, NO_SPLIT, "aggregation_seconds", event["seconds"]


def _cost(event: Mapping[str, Any]) -> Iterator[Value]:
    """Yields bytes, seconds and tokens of a round."""
    yield ALL, NO_SPLIT, "tokens_per_second", event["tokens_per_second"]
    for name, of_all, of_clients in (
        ("bytes", event["bytes"], event["client_bytes"]),
        ("seconds", event["seconds"], event["client_seconds"]),
    ):
        for kind, value in of_all.items():
            yield ALL, NO_SPLIT, f"{name}.{kind}", value
        for kind, by_client in of_clients.items():
            for client, value in by_client.items():
                yield client, NO_SPLIT, f"{name}.{kind}", value


def write_table(table: pandas.DataFrame, stem: Path) -> list[Path]:
    """Writes a table as Parquet and as CSV, each in one step.

    Args:
        table: The table.
        stem: Path of the files without their endings.

    Returns:
        The files.

    Raises:
        NotWritten: A file could not be written.
    """
    files = [stem.with_suffix(".parquet"), stem.with_suffix(".csv")]
    with replacing(files[0]) as draft:
        table.to_parquet(draft, index=False)
    with replacing(files[1]) as draft:
        table.to_csv(draft, index=False)
    return files
