"""The documentation: it builds without a warning, and its code runs as it is written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from warm_command import command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTED_ELSEWHERE = {"python.md"}
SETTINGS = {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}


def python_blocks(page: Path) -> list[str]:
    """Returns the Python code on a page, without sessions, which are doctests elsewhere."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    return [block for block in blocks if not block.startswith(">>>")]


def smaller_study() -> str:
    """Returns the first study of the page on sweeps, with less work in it."""
    page = (ROOT / "docs" / "sweep.md").read_text()
    (study, *_) = re.findall(r"```toml\n(.*?)```", page, flags=re.S)
    for line, less in (("seeds = [0, 1, 2]", "seeds = [0, 1]"), ("rounds = 3", "rounds = 1")):
        assert line in study
        study = study.replace(line, less)
    return study


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, **SETTINGS}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=550)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)], ROOT)
    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    reference = (tmp_path / "reference.html").read_text()
    assert "fedsplit.api.run" in reference and "Runs a federation." in reference
    assert "../" not in re.sub(r'(?:href|src)="[^"]*"|<[^>]*>', "", (tmp_path / "trunk.html").read_text())


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_the_quick_start_and_all_python_code_run_as_written(tmp_path: Path) -> None:
    """In one folder, since later pages open the run of the quick start."""
    quick_start = (ROOT / "docs" / "quickstart.md").read_text()
    commands = re.findall(r"^\$ (fedsplit [^#\n]*)", quick_start.partition("## Your own data")[0], flags=re.M)
    assert len(commands) == 4
    for words in map(shlex.split, commands):
        done = command(*words, cwd=tmp_path, env={**os.environ, **SETTINGS})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "adapter" / "adapter_model.safetensors").exists()
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "demo")
    (tmp_path / "study.toml").write_text(smaller_study())
    run([sys.executable, "-m", "fedsplit", "sweep", "study.toml"], tmp_path)
    pages = []
    for page in PAGES:
        blocks = python_blocks(page)
        if blocks and page.name not in TESTED_ELSEWHERE:
            pages.append(tmp_path / f"{page.stem}_page.py")
            pages[-1].write_text("\n".join(blocks))
    # One process for all pages, since most of a short one is the import of the libraries.
    script = "import runpy, sys; sys.path[:0] = ['']; [runpy.run_path(page) for page in sys.argv[1:]]"
    run([sys.executable, "-c", script, *map(str, pages)], tmp_path)
