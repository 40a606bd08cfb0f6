"""A new project, as a user makes it and runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm_command
from flwr.cli.config_utils import load_and_validate

from fedsplit.commands.new import TEMPLATE, check, main, make
from fedsplit.commands.server_app import config_of
from fedsplit.errors import InputError, SettingError
from fedsplit.settings.flags import settle


def test_a_project_has_the_files_of_the_template_under_its_own_name(tmp_path: Path) -> None:
    made = make(tmp_path / "two-wards")
    files = {str(file.relative_to(tmp_path / "two-wards")) for file in (tmp_path / "two-wards").rglob("*.*")}
    assert files == {str(file) for file in made}
    assert {".gitignore", "README.md", "pyproject.toml", "run.toml", "two_wards/strategy.py"} <= files
    assert len(made) == sum(file.is_file() and "__pycache__" not in file.parts for file in TEMPLATE.rglob("*"))
    for file in made:
        text = (tmp_path / "two-wards" / file).read_text()
        assert "my-project" not in text and "my_project" not in text, file


@pytest.mark.parametrize("name", ["a", "my-wards", "wards2", "a_b-c"])
def test_names_of_projects(tmp_path: Path, name: str) -> None:
    check(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-wards", "a name of small letters"),
        ("2wards", "a name of small letters"),
        ("wards-", "a name of small letters"),
        ("my wards", "a name of small letters"),
        ("json", "a name that no installed module has, which json has"),
        ("fedsplit", "a name that no installed module has, which fedsplit has"),
        ("flwr-datasets", "a name that no installed module has, which flwr_datasets has"),
        ("taken", "a folder that does not exist yet"),
        ("taken-by-a-file", "a folder that does not exist yet"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken-by-a-file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingError, match=f"^project: .* is not possible; allowed: {words}"):
        make(tmp_path / name)
    assert main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        if path.name == "run.toml":
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        make(tmp_path / "my-wards")
    assert list(tmp_path.iterdir()) == []


def test_the_project_is_a_flower_app(tmp_path: Path) -> None:
    make(tmp_path / "two-wards")
    config, warnings = load_and_validate(tmp_path / "two-wards" / "pyproject.toml")
    assert all("license" in warning for warning in warnings)  # which is the user's to choose
    assert config["tool"]["flwr"]["app"]["publisher"] == "two-wards"
    settings = config_of(config["tool"]["flwr"]["app"]["config"], nodes=4)
    by_file = settle({}, {}, tmp_path / "two-wards" / "run.toml")
    assert replace(settings, engine=by_file.engine) == by_file


@pytest.mark.slow
def test_the_project_runs_as_it_is(tmp_path: Path) -> None:
    """`pip install --editable .` makes the module of the project known; here a variable does."""
    done = warm_command.command("fedsplit", "new", "my-wards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    project = tmp_path / "my-wards"
    env = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{Path.cwd()}"}

    tests = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=project, env=env, capture_output=True, text=True)
    assert tests.returncode == 0 and "4 passed" in tests.stdout, tests.stdout + tests.stderr

    smaller = ("--rounds", "1", "--train.steps", "1", "--eval.samples", "2", "--out", "run")
    run = [sys.executable, "-m", "fedsplit", "simulate", "--config", "run.toml", "--engine", "local", *smaller]
    done = subprocess.run(run, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((project / "run" / "summary.json").read_text())
    assert summary["strategy"] == "my_wards.strategy:Cautious" and summary["clients"] == 4

    for name in ("strategy:Cautious", "objective:Focal"):
        call = [sys.executable, "-m", "fedsplit", "check", f"my_wards.{name}"]
        done = subprocess.run(call, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
