"""The command that writes reports, and the report that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finished_runs import Runs
from reported_runs import write_run

from fedsplit.commands import simulate
from fedsplit.commands.report import main
from fedsplit.reporting import page


def test_a_page_and_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    runs = [str(write_run(tmp_path / name, strategy=name)) for name in ("fedavg", "flora")]
    monkeypatch.chdir(tmp_path)
    assert main([*runs, "--markdown", "table.md", "--latex", "table.tex", "--baseline", runs[0]]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("report.html: ") and len(said) == 3
    assert (tmp_path / "table.md").read_text().splitlines()[2].startswith("| fedavg | 1 | 3.0000 | 2.8000 |")
    assert (tmp_path / "table.tex").read_text().startswith("\\begin{tabular}")


def test_everything_that_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "mine.md").write_text("mine")
    flags = ["--out", f"{tmp_path}/no/x.html", "--markdown", f"{tmp_path}/mine.md", "--tokens", "0"]
    assert main([str(run), str(tmp_path / "nowhere"), *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fedsplit: {tmp_path}/nowhere is no folder of a run: there is no such folder",
        f"fedsplit: out: {tmp_path}/no/x.html is not possible; allowed: a file in a folder that is there",
        f"fedsplit: markdown: {tmp_path}/mine.md (there already) is not possible; allowed: a new file",
        "fedsplit: tokens: 0 is not possible; allowed: a whole number from 1 to 1000",
    ]
    assert not list(tmp_path.rglob("*.html"))
    (run / "summary.json").unlink()
    assert main([str(run), "--prompt", "My"]) == 2
    assert "did not end" in capsys.readouterr().err


def flags_of(model: Path, corpus: Path, out: Path) -> list[str]:
    """A run of a tiny model in this process."""
    settings = {"clients": 2, "rounds": 1, "cut": "1:2", "train.steps": 1, "train.batch-size": 2, "engine": "local"}
    settings |= {"train.max-length": 16, "eval.samples": 2, "model": model, "dataset": corpus, "out": out}
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.draws_reports
def test_a_run_leaves_its_report_unless_it_is_told_not_to(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = flags_of(tiny_models["gpt2"], corpus_file, run)
    assert simulate.main([*flags, "--report=false"]) == 0
    assert not (run / "report.html").exists()
    assert simulate.main(["--resume", str(run), "--rounds", "2", "--report=true"]) == 0
    text = (run / "report.html").read_text()
    assert "Loss by round" in text and "no report" not in capsys.readouterr().out


@pytest.mark.draws_reports
def test_a_report_that_fails_is_one_line_of_a_run_that_succeeds(
    tiny_models: dict[str, Path],
    corpus_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "page_of", lambda *_: 1 / 0)
    assert simulate.main(flags_of(tiny_models["gpt2"], corpus_file, tmp_path / "run")) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no report")]
    assert said == ["no report, and the run is complete without it: division by zero"]


@pytest.fixture(scope="module")
def finished(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Runs(tiny_models, tmp_path_factory.mktemp("runs"))("llama")


def test_a_prompt_shows_what_both_models_write(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([str(finished), "--out", str(out), "--prompt", "ab", "--tokens", "5"]) == 0
    text = out.read_text()
    assert text.count('<pre class="text">') == 2 and "Written by the base model" in text
