"""Study files that extend another: what both stand for together, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.studies.study import read_study

BASE = """
seeds = [0]
baseline = "a"
[settings]
"train.steps" = 8
train.lr = 0.5
rounds = 3
[grid]
lora.rank = [4, 8]
[[variants]]
name = "a"
[[variants]]
name = "b"
strategy = "fedprox"
"""

EXTENDING = """
extends = "base.toml"
seeds = [5, 6]
baseline = "c"
[settings]
train.steps = 2
clients = 3
[grid]
lora.rank = [2]
[[variants]]
name = "c"
strategy = "flora"
"""


def written(folder: Path, text: str, base: str = BASE) -> Path:
    (folder / "base.toml").write_text(base)
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_both_files_are_one_study(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, EXTENDING), {})
    assert not study.errors and study.baseline == {"variant": "c"}
    labels = ["a, lora.rank 2", "b, lora.rank 2", "c, lora.rank 2"]
    assert [(run.label, run.seed) for run in study.runs] == [(label, seed) for seed in (5, 6) for label in labels]
    configs = [run.draft.checked() for run in study.runs]
    assert [config.strategy for config in configs[:3]] == ["fedavg", "fedprox", "flora"]
    for config in configs:
        assert (config.train.steps, config.train.lr, config.rounds, config.clients) == (2, 0.5, 3, 3)
    assert "extends" not in study.file.document


def test_what_the_extending_file_leaves_out_is_that_of_the_base(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, 'extends = "base.toml"\n'), {})
    base = read_study(tmp_path / "base.toml", {})
    assert (study.runs, study.axes, study.columns, study.baseline) == (
        base.runs,
        base.axes,
        base.columns,
        base.baseline,
    )


def test_copies_of_both_files_are_the_same_study(tmp_path: Path) -> None:
    path = written(tmp_path, EXTENDING)
    study = read_study(path, {})
    copies = tmp_path / "out"
    copies.mkdir()
    for name, text in study.file.texts.items():
        (copies / name).write_text(text)
    assert sorted(study.file.texts) == ["base.toml", "study.toml"]
    assert read_study(copies / "study.toml", {}).file == study.file


WRONG = {
    "extends = 3": "extends: 3 is not possible; allowed: the name of a file in the same folder",
    "extends = ''": "allowed: the name of a file in the same folder",
    "extends = '../base.toml'": "extends: ../base.toml is not possible; allowed: the name of a file in the same folder",
    "extends = 'none.toml'": "none.toml cannot be read (No such file or directory)",
    "extends = 'study.toml'": "study.toml, which extends another file; allowed: one file that extends none",
    "extends = 'base.toml'\ngrid = 3": "grid: 3 is not possible; allowed: a table of settings",
    "extends = 'base.toml'\nvariants = 3": "variants: 3 is not possible; allowed: tables [[variants]]",
    "extends = 'base.toml'\n[[variants]]\nname = 'a'": "variants: a twice is not possible",
    "extends = 'base.toml'\n[settings]\nlora.rank = 3": "a setting of [settings] or of [grid], not of both",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_extended_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as refused:
        read_study(written(tmp_path, text), {})
    (error,) = refused.value.errors
    assert WRONG[text] in str(error) and "\n" not in str(error)


WRONG_BASE = {
    "grid = 3": "grid: 3 is not possible; allowed: a table of settings",
    "[settings": "base.toml is not TOML",
    "\xff": "base.toml is not TOML",
    "sead = 1": "base.toml: there is no key sead; did you mean seeds?",
}


@pytest.mark.parametrize("base", WRONG_BASE)
def test_errors_in_the_base_are_named(tmp_path: Path, base: str) -> None:
    path = written(tmp_path, 'extends = "base.toml"\n[grid]\nclients = [2]')
    (tmp_path / "base.toml").write_bytes(base.encode("latin-1"))
    with pytest.raises(InputError) as refused:
        read_study(path, {})
    (error,) = refused.value.errors
    assert WRONG_BASE[base] in str(error)
