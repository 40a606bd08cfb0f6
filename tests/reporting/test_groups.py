"""Which runs count as repetitions, and what their groups are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.groups import groups_of, notices
from fedsplit.reporting.page import html_of
from fedsplit.reporting.run_record import read_run


def test_a_seed_counts_once_however_often_it_is_given(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run-{seed}", gain=0.1 + seed / 10, seed=seed) for seed in (0, 1)]
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    runs = [read_run(folder) for folder in (*folders, folders[0] / ".", copy)]
    (group,) = groups_of(runs)
    assert (group.name, [run.name for run in group.runs]) == ("all runs", ["run-0", "run-1"])
    again, equal = notices(runs)
    assert again == f"{folders[0]} was given more than once, and counts once."
    assert equal.startswith(f"{copy} has the settings and the seed 0 of {folders[0]}, and does not count")
    page = html_of(runs)
    assert "1 kind of run, up to 2 runs of a kind" in page and equal in page


def test_a_single_run_given_twice_is_a_page_of_one_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    page = html_of([run, run])
    assert "<h1>run</h1>" in page and "was given more than once" in page


def test_a_run_of_other_workers_is_no_repetition_and_says_what_differs(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"run-{workers}", workers=workers)) for workers in (1, 2)]
    (line,) = notices(runs)
    assert "run-2 has the settings (but for workers) and the seed 0 of" in line


def test_runs_without_settings_are_no_repetitions_of_any_run(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for folder in folders[1:]:
        (folder / "config.toml").unlink()
    groups = groups_of([read_run(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    assert [group.name for group in groups[1:]] == ["b", "c"]


def test_names_that_figures_would_cut_alike_become_letters_with_a_key(tmp_path: Path) -> None:
    unlike = ("fedavg", 0.01), ("fedavg", 0.02), ("flora", 0.01)
    runs = []
    for number, (strategy, rate) in enumerate(unlike):
        settings = {"strategy": strategy, "train.lr": rate}
        runs.append(read_run(write_run(tmp_path / f"run-{number}", **settings)))
    baseline = read_run(write_run(tmp_path / "A"))
    groups = groups_of(runs)
    assert [group.label for group in groups] == ["A", "B", "C"]
    key = "A: strategy fedavg, train.lr 0.01. B: strategy fedavg, train.lr 0.02. C: strategy flora, train.lr 0.01."
    page = html_of(runs, baseline)
    assert page.count(key) == 5 and f"{key} baseline: A." in page
    assert "…" not in page and all(f">{label}</text>" in page for label in ("A", "B", "C", "baseline"))


def test_losses_on_different_texts_are_said_to_be(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    alike = write_run(tmp_path / "alike", strategy="flora", **{"train.lr": 0.01})
    assert notices([read_run(first), read_run(alike)]) == []

    other = write_run(tmp_path / "other", partition="iid", **{"data.split": "test"})
    (line,) = notices([read_run(first), read_run(other)])
    assert line == "The losses are measured on different texts: the runs differ in partition and data.split."

    document = json.loads((alike / "data.json").read_text())
    document["clients"][0]["held_out"]["sequences"] += 1
    (alike / "data.json").write_text(json.dumps(document))
    runs = [read_run(first), read_run(alike)]
    (line,) = notices(runs)
    assert "the clients' held-out sequences and tokens (data.json)" in line
    assert "measured on different texts" in html_of(runs)
