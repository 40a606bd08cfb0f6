"""The run's folder: complete, loadable, never half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS
from safetensors.torch import load_file
from test_lora import adapted

from fedsplit.adaptation import lora
from fedsplit.allowed import SettingError
from fedsplit.config import Config, LoraSettings
from fedsplit.federation.checkpoint import RunFolder, Snapshot, check_folder, check_resumable, last_round
from fedsplit.flags import parse
from fedsplit.lowrank import LowRank


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> RunFolder:
    config = Config(model=str(tiny_models["gpt2"]), cut="1:2", lora=LoraSettings(rank=(3,), alpha=6.0))
    parts = adapted(tiny_models["gpt2"], (1, 2))
    made = RunFolder(tmp_path / "run", config, parts[0].family, BLOCKS)
    made.whole = lora.read(*parts)  # type: ignore[attr-defined]
    return made


def snapshot(round: int) -> Snapshot:
    return Snapshot(round, {"after": 1.5 + round}, {"adapters": {"x": torch.full((2,), float(round))}})


def test_the_configuration_written_is_the_one_that_ran(folder: RunFolder) -> None:
    assert parse(["--config", str(folder.path / "config.toml")]) == folder._config


def test_a_folder_that_another_run_made_meanwhile_is_refused_and_left_as_it_is(folder: RunFolder) -> None:
    before = (folder.path / "config.toml").read_text()
    with pytest.raises(SettingError, match="there already"):
        RunFolder(folder.path, dataclasses.replace(folder._config, rounds=9), folder._family, BLOCKS)
    assert (folder.path / "config.toml").read_text() == before


def test_events_are_a_line_each(folder: RunFolder) -> None:
    folder.log({"round": 1})
    folder.log({"round": 2})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]


def test_a_finished_run_has_every_file_and_each_part_its_own_blocks(folder: RunFolder) -> None:
    folder.save_round(snapshot(1), folder.whole)
    folder.save_result(folder.whole, {"seed": 0})
    found = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    pair = ("adapter_config.json", "adapter_model.safetensors")
    places = ("adapter", "bottom_lora", "trunk_lora", "top_lora", "checkpoints/round-0001")
    state = {f"checkpoints/round-0001/state.{kind}" for kind in ("json", "safetensors")}
    assert found == {"config.toml", "summary.json", "checkpoints/.lock", *state} | {
        f"{place}/{name}" for place in places for name in pair
    }
    whole = load_file(folder.path / "adapter" / "adapter_model.safetensors")
    parts = [
        load_file(folder.path / f"{kind}_lora" / "adapter_model.safetensors") for kind in ("bottom", "trunk", "top")
    ]
    assert sum(len(part) for part in parts) == len(whole) == len(folder.whole.tensors)
    assert all(".h.1." in name for name in parts[1])


def test_a_crash_while_writing_leaves_no_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        folder.save_round(snapshot(1), folder.whole)
    assert not (folder.path / "checkpoints" / "round-0001").exists()
    monkeypatch.undo()
    folder.save_round(snapshot(1), folder.whole)
    assert (folder.path / "checkpoints" / "round-0001" / "adapter_config.json").exists()


def test_a_run_goes_on_from_its_last_whole_round(folder: RunFolder) -> None:
    """What came after it, or was cut off in the middle of a line, is dropped."""
    assert folder.snapshot() is None
    for round in (1, 2):
        folder.log({"event": "train", "round": round})
        folder.save_round(snapshot(round), folder.whole)
    folder.log({"event": "train", "round": 3})
    (folder.path / "checkpoints" / ".round-0003.draft").mkdir()
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "evaluate", "rou')
    config = dataclasses.replace(folder._config, resume=str(folder.path), rounds=9)
    again = RunFolder(folder.path, config, folder._family, BLOCKS)
    found = again.snapshot()
    assert found is not None
    assert (found.round, found.facts["after"]) == (2, 3.5)
    assert torch.equal(found.groups["adapters"]["x"], torch.full((2,), 2.0))
    events = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events] == [1, 2]
    assert parse(["--config", str(folder.path / "config.toml")]).rounds == 9


def test_what_cannot_go_on_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    for path in (folder.path, tmp_path / "nowhere"):
        with pytest.raises(SettingError, match=r"^resume: .*allowed: the folder of a run that ended one round"):
            check_resumable(path, 5)
    folder.log({"round": 1})
    folder.save_round(snapshot(1), folder.whole)
    folder.save_round(snapshot(2), folder.whole)
    check_resumable(folder.path, 3)
    check_resumable(folder.path, 2)  # killed before it was summed up
    with pytest.raises(SettingError, match=r"^rounds: 1 is not possible; allowed: more than 2"):
        check_resumable(folder.path, 1)
    (folder.path / "summary.json").write_text('{"last_round": 2}')
    with pytest.raises(SettingError, match=r"^rounds: 2 is not possible; allowed: more than 2"):
        check_resumable(folder.path, 2)


def test_a_round_is_read_as_it_was_written(folder: RunFolder) -> None:
    """With clients' own adapters, and with what was folded in the factors."""
    whole = folder.whole
    (layer, *_) = whole.complete
    a, b = whole.factors(layer)
    folded = LowRank(torch.randn(b.shape[0], 2), torch.randn(2, a.shape[1]))
    own = whole.with_tensors({name: tensor + 1 for name, tensor in whole.tensors.items()})
    folder.save_round(snapshot(1), dataclasses.replace(whole, folded={layer: folded}), {4: own})
    back, personal = folder.read_round(1)
    assert list(personal) == [4]
    assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in personal[4].tensors.items())
    for name in whole.complete:
        expected = whole.change(name) + folded.to(torch.float64) if name == layer else whole.change(name)
        found = back.change(name)
        assert torch.allclose(found.up @ found.down, expected.up @ expected.down, atol=1e-6), name
    folder.save_result(back, {})
    round = folder.path / "checkpoints" / "round-0001"
    written, left = (load_file(place / "adapter_model.safetensors") for place in (round, folder.path / "adapter"))
    assert left.keys() == written.keys() and all(torch.equal(tensor, written[name]) for name, tensor in left.items())
    texts = [(place / "adapter_config.json").read_text() for place in (round, folder.path / "adapter")]
    assert [json.loads(text)["alpha_pattern"] for text in texts] == [{layer: 5}] * 2


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


@pytest.mark.parametrize(
    ("file", "content"),
    [("state.json", b'{"rou'), ("state.json", b"{}"), ("state.safetensors", b"x" * 30), ("state.json", None)],
)
def test_a_damaged_checkpoint_is_named(folder: RunFolder, file: str, content: bytes | None) -> None:
    folder.log({"round": 1})
    for round in (1, 2):
        folder.save_round(snapshot(round), folder.whole)
    path = folder.path / "checkpoints" / "round-0002" / file
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(SettingError, match=r"round-0002 is damaged: .*remove .*round-0002 to go on") as caught:
        check_resumable(folder.path, 5)
    assert "\n" not in str(caught.value)
    for inside in path.parent.iterdir():
        inside.unlink()
    path.parent.rmdir()
    check_resumable(folder.path, 5)


def test_the_last_round_is_the_one_with_the_largest_number(tmp_path: Path) -> None:
    for number in ("0001", "9999", "10000"):
        (tmp_path / "checkpoints" / f"round-{number}").mkdir(parents=True)
    last = last_round(tmp_path)
    assert last is not None and last.name == "round-10000"


def test_a_folder_that_a_run_is_at_work_in_is_refused_until_that_run_is_gone(folder: RunFolder) -> None:
    """However it ends: nothing of it has to be removed."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    config = dataclasses.replace(folder._config, resume=str(folder.path))
    folder._lock.close()
    call = [sys.executable, "-c", hold, str(folder.path / "checkpoints" / ".lock")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(SettingError, match=r"^resume: .* is not possible; allowed: .* not at work any more$"):
            RunFolder(folder.path, config, folder._family, BLOCKS)
        other.kill()
    RunFolder(folder.path, config, folder._family, BLOCKS)
