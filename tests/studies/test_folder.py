"""The folder of a study."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.errors import SettingError
from fedsplit.events.versions import versions
from fedsplit.settings.config import Config
from fedsplit.studies.folder import digest_of, finished, name_of_run, occupied, settings_for


def test_a_run_is_another_one_when_its_settings_code_or_data_change(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    data = tmp_path / "notes.txt"
    mine.write_text("class Mine: ...")
    data.write_text("a text")
    config = Config(strategy=f"{mine}:Mine", dataset=str(data))
    digests = {digest_of(config), digest_of(replace(config, rounds=6)), digest_of(replace(config, workers=2))}
    assert len(digests) == 3
    assert digest_of(replace(config, out="elsewhere", sinks=("a:B",))) == digest_of(config)

    from fedsplit.studies import folder

    for file in (mine, data):
        file.write_text(file.read_text() + "\n")
        folder._digest_of_file.cache_clear()
        digests.add(digest_of(config))
    assert len(digests) == 5


def test_a_run_is_another_one_with_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsplit.studies import folder

    digests = {digest_of(Config())}
    for changed in ({"fedsplit": "9"}, {"peft": "9"}, {"ray": "9"}):
        monkeypatch.setattr(folder, "versions", lambda changed=changed: {**versions(), **changed})
        digests.add(digest_of(Config()))
    assert len(digests) == 3, "Ray computes no numbers"


def test_names_are_names_of_folders() -> None:
    name = name_of_run("path/to/mine.py:Mine, lora.rank 2,4", 7, Config())
    assert name.startswith("path-to-mine.py-Mine-lora.rank-2-4-seed-7-") and "/" not in name
    assert name_of_run("..", 0, Config()).startswith("seed-0-")


def test_a_folder_without_a_run_begins_one(tmp_path: Path) -> None:
    assert finished(tmp_path, "a", 0) is None
    config = settings_for(tmp_path / "run", Config(rounds=2))
    assert config.out == str(tmp_path / "run") and config.resume == ""


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    code = "import sys, pathlib, fedsplit.studies.folder as f; f.occupied(pathlib.Path(sys.argv[1])).__enter__()"
    with occupied(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "a folder in which no other sweep is at work" in done.stderr
    assert SettingError.__name__ in done.stderr
    with occupied(tmp_path):
        pass


@pytest.mark.parametrize("name", ["runs", "logs"])
def test_the_folders_are_made(tmp_path: Path, name: str) -> None:
    with occupied(tmp_path / "study"):
        assert (tmp_path / "study" / name).is_dir()
