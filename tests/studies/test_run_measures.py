"""Measures of a finished run, beside numbers that were worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedsplit.settings.config import Config
from fedsplit.studies.run_measures import ERROR, FORGOTTEN, LOSS, MB_DOWN, MB_UP, WORST, measures_of
from fedsplit.studies.table import FinishedRun

SENT = {"adapter_up": 3_000_000, "adapter_down": 5_000_000}
STEPS = {f"{kind}_{way}": 250_000 for kind in ("activation", "gradient") for way in ("up", "down")}
SUMMARY = {
    "eval_loss": {"after": 2.0},
    "eval_round": 1,
    "metrics": {"rouge": {"after": None}, "bleu": {"after": 0.25}},
    "bytes": {**SENT, **STEPS},
    "tokens": 90,
    "tokens_per_second": 10.0,
}


def evaluated(round: int, clients: dict[str, float], forgotten: dict[str, float]) -> dict[str, Any]:
    return {"event": "evaluate", "round": round, "clients": clients, "forgotten": forgotten}


def aggregated(round: int, error: float | None) -> dict[str, Any]:
    return {"event": "aggregate", "round": round, "error": error}


def measured(folder: Path, *events: dict[str, Any], **summary: Any) -> dict[str, float]:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return measures_of(FinishedRun("", "", 0, folder, Config(), {**SUMMARY, **summary}))


def test_a_run_has_these_measures(tmp_path: Path) -> None:
    """Round 1 left its adapter; round 2 was worse, and its error counts all the same."""
    first = evaluated(1, {"ann": 1.5, "bob": 2.75}, {"ann": 0.25, "bob": -0.75})
    second = evaluated(2, {"ann": 9.0, "bob": 9.0}, {"ann": 9.0})
    found = measured(tmp_path, evaluated(0, {"ann": 7.0}, {}), aggregated(1, 0.5), first, aggregated(2, 0.25), second)
    assert found == {
        LOSS: 2.0,
        "bleu": 0.25,
        WORST: 2.75,
        FORGOTTEN: -0.25,
        ERROR: 0.375,
        MB_UP: 3.0,
        MB_DOWN: 5.0,
        "activation and gradient MB": 1.0,
        "tokens": 90.0,
        "training seconds": 9.0,
    }


def test_of_a_round_that_was_played_again_the_last_values_count(tmp_path: Path) -> None:
    first = [aggregated(1, 0.5), evaluated(1, {"ann": 9.0}, {"ann": 9.0})]
    again = [aggregated(1, 0.125), evaluated(1, {"ann": 3.0}, {"ann": 0.5})]
    found = measured(tmp_path, *first, *again)
    assert (found[ERROR], found[WORST], found[FORGOTTEN]) == (0.125, 3.0, 0.5)


def test_what_a_run_did_not_report_is_left_out(tmp_path: Path) -> None:
    found = measured(tmp_path, aggregated(1, None), evaluated(1, {"ann": 3.0}, {}), tokens_per_second=None)
    assert not {ERROR, FORGOTTEN, "training seconds", "rouge"} & found.keys() and found[WORST] == 3.0


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (1.0, math.nan)])
def test_no_client_is_the_worst_where_a_loss_is_not_a_number(tmp_path: Path, losses: tuple[float, float]) -> None:
    one, other = losses
    assert WORST not in measured(tmp_path, evaluated(1, {"ann": one, "bob": other}, {}))
