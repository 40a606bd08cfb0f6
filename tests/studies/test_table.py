"""The tidy table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas

from fedsplit.settings.config import Config
from fedsplit.studies.table import FinishedRun, tidy, write_table

EVALUATED = {
    "event": "evaluate",
    "round": 1,
    "loss": 2.0,
    "perplexity": 7.4,
    "clients": {"ann": 1.5, "bob": 2.5},
    "metrics": {"rouge": 0.5},
    "client_metrics": {"rouge": {"ann": 0.25, "bob": None}},
    "forgotten": {"ann": 0.1},
    "bytes": {"adapter_up": 8},
    "tokens": 10,
    "seconds": 0.5,
    "elapsed": 3.0,
}
COST = {
    "event": "cost",
    "round": 1,
    "bytes": {"adapter_up": 8},
    "client_bytes": {"adapter_up": {"ann": 5}},
    "seconds": {"training": 1.0},
    "client_seconds": {"training": {"ann": 0.5}},
    "tokens_per_second": None,
}
TRAINED = {"event": "train", "round": 1, "loss": None, "clients": {"ann": 3.0}, "tokens": 6, "seconds": 1.0}
AGGREGATED = {"event": "aggregate", "round": 1, "error": None, "seconds": 0.1}


def table_of(folder: Path, *events: dict[str, object]) -> pandas.DataFrame:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = Config(strategy="fedprox", strategy_options={"mu": 0.5}, seed=4)
    run = FinishedRun("fedprox-seed-4", "fedprox", 4, folder, config, {})
    return tidy([run], ["strategy", "strategy_options.mu", "lora.rank"])


def test_a_row_for_each_round_client_split_and_metric(tmp_path: Path) -> None:
    table = table_of(tmp_path, TRAINED, AGGREGATED, EVALUATED, COST)
    assert list(table.columns[:6]) == ["run", "label", "seed", "strategy", "strategy_options.mu", "lora.rank"]
    assert set(table["strategy_options.mu"]) == {0.5} and set(table["lora.rank"]) == {8}
    values = {(row.client, row.split, row.metric): row.value for row in table.itertuples()}
    assert values["all", "held_out", "loss"] == 2.0 and values["bob", "held_out", "loss"] == 2.5
    assert values["ann", "train", "loss"] == 3.0 and values["all", "", "bytes.adapter_up"] == 8
    assert values["ann", "", "bytes.adapter_up"] == 5 and values["ann", "", "seconds.training"] == 0.5
    assert values["ann", "held_out", "rouge"] == 0.25 and values["all", "held_out", "rouge"] == 0.5
    missing = [("all", "train", "loss"), ("bob", "held_out", "rouge"), ("all", "", "aggregation_error")]
    assert not set(missing) & values.keys()
    assert not table.duplicated(["run", "round", "client", "split", "metric"]).any()


def test_a_round_that_was_played_again_counts_once(tmp_path: Path) -> None:
    again = {**EVALUATED, "loss": 1.0}
    table = table_of(tmp_path, EVALUATED, {"event": "client-failed", "round": 1}, again)
    losses = table[(table.client == "all") & (table.metric == "loss")]
    assert list(losses.value) == [1.0]


def test_both_files_hold_the_same_table(tmp_path: Path) -> None:
    table = table_of(tmp_path, TRAINED, EVALUATED)
    parquet, csv = write_table(table, tmp_path / "table")
    pandas.testing.assert_frame_equal(pandas.read_parquet(parquet), table, check_dtype=False)
    read = pandas.read_csv(csv, keep_default_na=False)
    assert list(read.value) == list(table.value) and list(read.split) == list(table.split)


def test_columns_of_mixed_values_are_texts_that_parquet_takes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(EVALUATED) + "\n")
    ranks = [(4,), (2, 4, 8)]
    options: list[dict[str, Any]] = [{"a": True, "b": 1, "c": 2**70}, {"a": "off", "b": 0.5, "c": 1}]
    runs = []
    for rank, own in zip(ranks, options, strict=True):
        config = Config(strategy_options=own, metric=("token_accuracy",))
        config = replace(config, lora=replace(config.lora, rank=rank))
        runs.append(FinishedRun("", str(rank), 0, tmp_path, config, {}))
    columns = ["lora.rank", *(f"strategy_options.{key}" for key in "abc"), "metric"]
    table = tidy(runs, columns, {str(rank): {"variant": f"v{len(rank)}"} for rank in ranks})
    parquet, _ = write_table(table, tmp_path / "table")
    read = pandas.read_parquet(parquet)
    assert list(read["variant"].unique()) == ["v1", "v3"] and list(read["settings.metric"].unique()) == [
        "token_accuracy"
    ]
    assert list(read["lora.rank"].unique()) == ["4", "2,4,8"]
    assert list(read["strategy_options.a"].unique()) == ["true", "off"]
    assert list(read["strategy_options.b"].unique()) == [1, 0.5]


def test_ranks_of_clients_are_one_cell() -> None:
    from fedsplit.studies.table import value_of

    config = Config()
    mixed = replace(config, lora=replace(config.lora, rank=(2, 4)))
    assert value_of(mixed, "lora.rank") == "2,4" and value_of(config, "metric") == ""
