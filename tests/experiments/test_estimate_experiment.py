"""The experiment on estimated memory: its table, and what its result says."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.estimate import measure

EXPERIMENT = Path("experiments/estimate")


def test_the_table_is_the_results() -> None:
    result = json.loads((EXPERIMENT / "result.json").read_text())
    assert measure.text(result) in (EXPERIMENT / "README.md").read_text()


def test_a_row_and_the_words_below() -> None:
    machine = {"cpu": "a", "cores": 2, "memory": 2**30, "date": "today", "commit": "c", "versions": {"python": "3"}}
    record = {"model": "m", "role": "trunk", "dtype": "fp32", "batch_size": 4, "max_length": 128, "weights": 100e6}
    records = [{**record, "estimated": 654e6, "measured": 600e6}, {**record, "estimated": 660e6, "measured": 500e6}]
    lines = measure.text({"machine": machine, "records": records}).splitlines()
    assert "| m | trunk | fp32 | 4 x 128 | 100 | 654 | 600 | +9.0% |" in lines
    assert lines[-1] == "1 of 2 estimates are within 10 % of the peak; the furthest is off by 32.0%."


def test_estimates_are_those_of_this_code() -> None:
    """The estimate of one row, made anew: the constants and the tracing have not changed since."""
    result = json.loads((EXPERIMENT / "result.json").read_text())
    record = next(one for one in result["records"] if one["model"] == "bundled" and one["role"] == "trunk")
    assert measure.estimated({**record, "folder": "sotu-gpt2"})["estimated"] == record["estimated"]
