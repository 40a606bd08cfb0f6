"""The table at the end of a run."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console

from fedsplit.events.final_table import final_table, legend, next_commands
from fedsplit.network.times import PLACES

SUMMARY: dict[str, Any] = {
    "eval_loss": {"before": math.log(20), "after": math.log(10)},
    "parameters": {"bottom": {"total": 1000, "trainable": 10}, "top": {"total": 2000, "trainable": 0}},
    "bytes": {
        f"{what}_{way}": 1_500_000
        for what in ("activation", "gradient", "adapter", "evaluation")
        for way in ("up", "down")
    },
    "peak_memory": {"client": 700_000_000, "trunk": 500_000_000},
    "tokens": 12345,
    "tokens_per_second": 678.9,
    "wall_seconds": 12.34,
}


def shown(summary: dict[str, Any]) -> str:
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    console.print(final_table(summary, "runs/x"))
    return shown.getvalue()


def test_the_table_says_all_that_was_asked_for() -> None:
    text = shown(SUMMARY)
    for words in ("2.9957 -> 2.3026", "20.00 -> 10.00", "1,000, of which trained 10", "1.5 MB up, 1.5 MB down"):
        assert words in text
    for words in ("client process 700.0 MB, trunk 500.0 MB", "12.3 s; 12,345 tokens trained, 679 a second", "runs/x"):
        assert words in text


def test_the_table_to_the_letter() -> None:
    """With every row that a run may have."""
    more = {"aggregation_error": 0.25, "forgotten": -0.125, "client_rounds": {"asked": 8, "failed": 2}}
    lines = [line.rstrip() for line in shown({**SUMMARY, **more}).splitlines()]
    assert lines == [
        "held-out loss      2.9957 -> 2.3026",
        "perplexity         20.00 -> 10.00",
        "aggregation error  0.25 in the last round",
        "forgotten          -0.1250 nats a token",
        "bottom parameters  1,000, of which trained 10",
        "top parameters     2,000, of which trained 0",
        "activations        1.5 MB up, 1.5 MB down",
        "gradients          1.5 MB up, 1.5 MB down",
        "adapters           1.5 MB up, 1.5 MB down",
        "for evaluation     1.5 MB up, 1.5 MB down",
        "peak memory        client process 700.0 MB, trunk 500.0 MB",
        "time               12.3 s; 12,345 tokens trained, 679 a second",
        "files              runs/x",
        "failures           2 of 8 client-rounds failed",
    ]


def test_the_table_says_which_round_the_adapter_is_of_where_it_is_not_the_last() -> None:
    texts = [shown({**SUMMARY, "last_round": 3, "adapter_round": left}) for left in (3, 2)]
    (said,) = [line for line in "".join(texts).splitlines() if "round" in line]
    assert said.split() == ["adapter", "of", "round", "2,", "the", "best", "of", "3"]


def test_metrics_have_a_row_each() -> None:
    ends = {"rouge": {"before": 0.1, "after": 0.25}, "length": {"before": None, "after": 12.0}}
    rows = [line.split() for line in shown({**SUMMARY, "metrics": ends}).splitlines()]
    assert ["rouge", "0.1", "->", "0.25"] in rows and ["length", "-", "->", "12"] in rows


def test_a_word_is_explained_where_the_table_has_it() -> None:
    assert legend(SUMMARY) == []
    (line,) = legend({**SUMMARY, "aggregation_error": 0.0})
    assert line.startswith("aggregation error: ")
    assert len(legend({**SUMMARY, "aggregation_error": 0.0, "forgotten": 0.0})) == 2


def test_a_classifier_is_not_asked_for_text() -> None:
    assert [command.split()[1] for command in next_commands(SUMMARY, "runs/x")] == ["generate", "evaluate", "report"]
    of_sites = {**SUMMARY, "at_sites": True}
    assert [command.split()[1] for command in next_commands(of_sites, "runs/x")] == ["generate", "report"]
    classifier = {**SUMMARY, "accuracy": {"before": 0.5, "after": 0.75}}
    assert [command.split()[1] for command in next_commands(classifier, "runs/x")] == ["evaluate", "report"]


def test_virtual_time_has_rows_of_its_own() -> None:
    places = {place: 0.0 for place in PLACES} | {"wire_up": 3.0, "wire_down": 1.0}
    virtual = {"seconds": 14.6, "training": 11.0, "evaluation": 3.6, "places": places, "late": 2, "unavailable": 0}
    virtual["surplus"] = 1
    requests = {"asked": 6, "failed": 0}
    virtual["stragglers"] = {"bob": 1, "ann": 3}
    text = shown({**SUMMARY, "virtual": virtual, "client_rounds": requests})
    assert "14.6 s on the network: training 11.0 s, evaluation 3.6 s" in text
    assert "sending up 75%" in text and "receiving 25%" in text
    assert "1 not needed (over-selection), 2 after the deadline, of 6 requests to train" in text
    assert "fail" not in text and "ann in 3 rounds, bob in 1 round" in text
    assert "virtual" not in shown(SUMMARY)
