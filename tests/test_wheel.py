"""What users get: the wheel's contents, and a run from it in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release would be, in a copy: two processes that build in one folder disturb each other."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    for name in ("fedsplit", "strategies"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, source)
    call = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_both_packages_the_model_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path) for package in ("fedsplit", "strategies") for path in Path(package).rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert {"fedsplit/base/model.safetensors", "fedsplit/base/tokenizer.json", "fedsplit/base/README.md"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import fedsplit, strategies; print(fedsplit.__file__, strategies.__file__)"],
        capture_output=True,
        text=True,
        cwd=work,
        env=environment,
    )
    assert where.stdout.count(str(site)) == 2
    argv = ["--clients", "2", "--rounds", "1", "--train.steps", "1", "--eval.samples", "2", "--max-length", "32"]
    call = [sys.executable, "-m", "fedsplit.simulate", *argv, "--out", "run"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=work, env=environment, timeout=550)
    assert done.returncode == 0, done.stderr
    assert (work / "run" / "adapter" / "adapter_model.safetensors").exists()
