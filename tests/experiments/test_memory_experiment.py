"""The memory experiment: its table, and what its result says."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.memory import measure

EXPERIMENT = Path("experiments/memory")


def test_the_table_is_the_results() -> None:
    result = json.loads((EXPERIMENT / "result.json").read_text())
    assert measure.text(result) in (EXPERIMENT / "README.md").read_text()


def test_a_row() -> None:
    machine = {"cpu": "a", "cores": 2, "memory": 2**30, "date": "today", "commit": "c", "versions": {"python": "3"}}
    sizes = {"weights": 100e6, "libraries": 500e6, "loaded": 650e6, "anonymous": 1, "mapped": 120e6, "step": 700e6}
    text = measure.text({"machine": machine, "records": [{"model": "m", "role": "trunk", **sizes}]})
    assert text.splitlines()[-1] == "| m | trunk | 100 | 500 | 650 | 1.50 | 120 | 700 |"


def test_a_party_loads_what_it_owns_and_hardly_more() -> None:
    """A client and the trunk together peak at the weights of the whole, and what is read while it is cast."""
    result = json.loads((EXPERIMENT / "result.json").read_text())
    for model in {record["model"] for record in result["records"]}:
        by_role = {record["role"]: record for record in result["records"] if record["model"] == model}
        client, trunk, whole = (by_role[role] for role in ("client", "trunk", "whole"))
        assert abs(client["weights"] + trunk["weights"] - whole["weights"]) < 1e4
        for party in (client, trunk):
            assert party["loaded"] - party["libraries"] < 1.15 * party["weights"] + 64e6
            assert party["loaded"] < whole["loaded"]
