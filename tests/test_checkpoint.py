"""The run's folder: complete, loadable, never half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import BLOCKS
from safetensors.torch import load_file
from test_adapters import adapted

from fedsplit import adapters
from fedsplit.checkpoint import RunFolder, check_folder
from fedsplit.config import Config, LoraSettings, SettingError, parse


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> RunFolder:
    config = Config(model=str(tiny_models["gpt2"]), cut="1:2", lora=LoraSettings(rank=(3,), alpha=6.0))
    parts = adapted(tiny_models["gpt2"], (1, 2))
    made = RunFolder(tmp_path / "run", config, parts[0].family, BLOCKS)
    made.tensors = adapters.read(*parts).tensors  # type: ignore[attr-defined]
    return made


def test_the_configuration_written_is_the_one_that_ran(folder: RunFolder) -> None:
    assert parse(["--config", str(folder.path / "config.toml")]) == folder._config


def test_events_are_a_line_each(folder: RunFolder) -> None:
    folder.log({"round": 1})
    folder.log({"round": 2})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]


def test_a_finished_run_has_every_file_and_each_part_its_own_blocks(folder: RunFolder) -> None:
    folder.save_round(1, folder.tensors)
    folder.save_result(folder.tensors, {"seed": 0})
    found = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    pair = ("adapter_config.json", "adapter_model.safetensors")
    places = ("adapter", "bottom_lora", "trunk_lora", "top_lora", "checkpoints/round-0001")
    assert found == {"config.toml", "summary.json"} | {f"{place}/{name}" for place in places for name in pair}
    whole = load_file(folder.path / "adapter" / "adapter_model.safetensors")
    parts = [
        load_file(folder.path / f"{kind}_lora" / "adapter_model.safetensors") for kind in ("bottom", "trunk", "top")
    ]
    assert sum(len(part) for part in parts) == len(whole) == len(folder.tensors)
    assert all(".h.1." in name for name in parts[1])


def test_a_crash_while_writing_leaves_no_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        folder.save_round(1, folder.tensors)
    assert not (folder.path / "checkpoints" / "round-0001").exists()
    monkeypatch.undo()
    folder.save_round(1, folder.tensors)
    assert (folder.path / "checkpoints" / "round-0001" / "adapter_config.json").exists()


def test_folders_that_cannot_be_used_are_refused_and_left_alone(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "summary.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name in ("full", "file", "file/below"):
        with pytest.raises(SettingError, match=r"^out: "):
            check_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(SettingError, match=r"^out: /proc/run \(.* in /proc\)"):
        check_folder(Path("/proc/run"))
