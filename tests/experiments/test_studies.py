"""Experiments that are study files: every run can be begun, and the committed result is theirs."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from experiments.strategies.report import FEDERATIONS, STEP_SIZES
from fedsplit.commands.sweep import DEFAULTS
from fedsplit.studies.comparison_table import Line, markdown
from fedsplit.studies.paired import PairedTest, Spread
from fedsplit.studies.run_measures import LOSS
from fedsplit.studies.study import read_study

STUDIES = {
    Path("experiments/comparison/study.toml"): Path("experiments/comparison/comparison.json"),
    Path("experiments/trunk/schedules.toml"): Path("experiments/trunk/schedules.json"),
    **{
        Path(f"experiments/strategies/{name}.toml"): Path(f"experiments/strategies/{name}.json")
        for name in (*FEDERATIONS, STEP_SIZES)
    },
}
"""Study files, and their results."""


def test_all_study_files_are_listed() -> None:
    files = [path for path in Path("experiments").rglob("*.toml") if path.name != "config.toml"]
    extended = {path.parent / str(tomllib.loads(path.read_text()).get("extends")) for path in files}
    assert {*files} - extended == STUDIES.keys()


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_every_run_has_right_settings_and_a_result(path: Path) -> None:
    study = read_study(path, DEFAULTS)
    assert not study.errors and study.baseline
    configs = [run.draft.checked() for run in study.runs]
    assert len({repr(config) for config in configs}) == len(configs)
    result = json.loads(STUDIES[path].read_text())
    assert result["study"] == study.file.document, "the result is that of the study file"
    losses = [line for line in result["comparison"] if line["measure"] == LOSS]
    assert [line["label"] for line in losses] == list(dict.fromkeys(run.label for run in study.runs))
    assert {seed for line in losses for seed in line["values"]} == {str(run.seed) for run in study.runs}


def test_the_readme_has_the_table_of_the_result() -> None:
    """The READMEs of other studies have tables of their own, by a report that has its own test."""
    result = Path("experiments/comparison/comparison.json")
    lines = []
    for line in json.loads(result.read_text())["comparison"]:
        test = PairedTest(**line["test"]) if line["test"] else None
        spread = Spread(**line["spread"])
        lines.append(Line(line["label"], line["measure"], line["values"], spread, line["baseline"], test))
    table = markdown([line for line in lines if line.measure == LOSS]).partition("\n\n")[0]
    assert table in (result.parent / "README.md").read_text()
