"""The network experiment: what its report makes of what was replayed and measured, and that its settings are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from experiments.network import buys, report
from fedsplit.network.profiles import PROFILES
from fedsplit.settings.documents import build

EXPERIMENT = Path("experiments/network")
MACHINE = {"cpu": "a", "cores": 2, "memory": 2**30, "date": "today", "commit": "c", "versions": {"python": "3"}}


def record(group: str, row: str, seconds: float) -> dict:
    networks = {name: {"seconds": seconds, "places": {}} for name in PROFILES}
    return {"group": group, "row": row, "networks": networks, "held_out": 3.0, "bytes": {"activation_up": 2_000_000}}


def test_a_row_is_compared_with_the_baseline_of_its_group() -> None:
    records = [record("codec", "raw", 8.0), record("codec", "bf16", 6.0), record("cut", "1:5", 1.0)]
    assert report.saved(records, records[1], "home") == 0.25
    text = report.buys_text({"machine": MACHINE, "records": records})
    assert "| `bf16` | 6 (-25%) | 6 (-25%)" in text and "| 2.0 MB | 3.0000 |" in text
    assert "| micro-batches |" not in text


def test_every_row_is_a_configuration_and_every_group_has_its_baseline() -> None:
    for group, rows in buys.ROWS.items():
        for settings in rows.values():
            config = build({**buys.BASE, **settings})
            assert config.rounds * config.train.steps == buys.STEPS
        baseline = rows[report.BASELINES[group]]
        assert build({**buys.BASE, **baseline}) == build(buys.BASE)


def test_the_readme_has_a_place_for_every_result(tmp_path: Path) -> None:
    shutil.copy(EXPERIMENT / "README.md", tmp_path / "README.md")
    for name in ("buys.json", "real.json"):
        report.write_between(tmp_path / "README.md", name, "text")


def test_committed_results_have_every_row() -> None:
    result = json.loads((EXPERIMENT / "buys.json").read_text())
    assert [(one["group"], one["row"]) for one in result["records"]] == [
        (group, row) for group, rows in buys.ROWS.items() for row in rows
    ]


def test_predictions_are_near_the_real_packets() -> None:
    result = json.loads((EXPERIMENT / "real.json").read_text())
    assert result["records"] and "measured" in report.real_text({**result, "machine": MACHINE})
