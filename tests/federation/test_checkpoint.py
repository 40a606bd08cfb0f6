"""The run's folder: complete, loadable, never half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS
from safetensors.torch import load_file
from test_lora import adapted

from fedsplit.adaptation import lora
from fedsplit.durable import NotWritten
from fedsplit.errors import SettingError
from fedsplit.events import RunEnded
from fedsplit.events.run_files import SummaryFile, append_document
from fedsplit.federation.checkpoint import (
    RunFolder,
    Snapshot,
    check_content,
    check_folder,
    check_resumable,
    last_round,
)
from fedsplit.federation.manifest import Content, Damaged
from fedsplit.lowrank import LowRank
from fedsplit.settings.config import Config
from fedsplit.settings.flags import parse
from fedsplit.settings.sections import DataSettings, LoraSettings, TrainSettings, TrunkSettings
from fedsplit.state.client_store import ClientState, ClientStore
from fedsplit.state.fold_log import FoldLog

CONTENT = Content("data", {"config.json": "one", "model.safetensors": "two"})


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> RunFolder:
    config = Config(model=str(tiny_models["gpt2"]), cut="1:2", lora=LoraSettings(rank=(3,), alpha=6.0))
    parts = adapted(tiny_models["gpt2"], (1, 2))
    made = RunFolder(tmp_path / "run", config, parts[0].family, BLOCKS, CONTENT)
    made.whole = lora.read(*parts)  # type: ignore[attr-defined]
    return made


def log(folder: RunFolder, document: dict[str, Any]) -> None:
    append_document(folder.path / "metrics.jsonl", document)


def sum_up(folder: RunFolder, summary: dict[str, Any]) -> None:
    SummaryFile(folder.path).handle(RunEnded(summary=summary, folder=str(folder.path)))


def going(folder: RunFolder, rounds: int) -> Config:
    """The settings of a run that is to go on."""
    return dataclasses.replace(folder._config, rounds=rounds, resume=str(folder.path))


def snapshot(round: int) -> Snapshot:
    return Snapshot(round, {"after": 1.5 + round}, {"adapters": {"x": torch.full((2,), float(round))}})


def test_the_configuration_written_is_the_one_that_ran(folder: RunFolder) -> None:
    assert parse(["--config", str(folder.path / "config.toml")]) == folder._config


def test_a_folder_that_another_run_made_meanwhile_is_refused_and_left_as_it_is(folder: RunFolder) -> None:
    before = (folder.path / "config.toml").read_text()
    with pytest.raises(SettingError, match="there already"):
        RunFolder(folder.path, dataclasses.replace(folder._config, rounds=9), folder._family, BLOCKS, CONTENT)
    assert (folder.path / "config.toml").read_text() == before


def test_a_finished_run_has_every_file_and_each_part_its_own_blocks(folder: RunFolder) -> None:
    folder.save_round(snapshot(1), folder.whole)
    folder.save_result(folder.whole)
    sum_up(folder, {"seed": 0})
    found = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    pair = ("adapter_config.json", "adapter_model.safetensors")
    places = ("adapter", "bottom_lora", "trunk_lora", "top_lora", "checkpoints/round-0001")
    state = {f"checkpoints/round-0001/{name}" for name in ("state.json", "state.safetensors", "manifest.json")}
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
        log(folder, {"event": "train", "round": round})
        folder.save_round(snapshot(round), folder.whole)
    log(folder, {"event": "train", "round": 3})
    (folder.path / "checkpoints" / ".round-0003.draft").mkdir()
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "evaluate", "rou')
    config = dataclasses.replace(folder._config, resume=str(folder.path), rounds=9)
    again = RunFolder(folder.path, config, folder._family, BLOCKS, CONTENT)
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
            check_resumable(path, going(folder, 5))
    log(folder, {"round": 1})
    folder.save_round(snapshot(1), folder.whole)
    folder.save_round(snapshot(2), folder.whole)
    check_resumable(folder.path, going(folder, 3))
    check_resumable(folder.path, going(folder, 2))  # killed before it was summed up
    with pytest.raises(SettingError, match=r"^rounds: 1 is not possible; allowed: more than 2"):
        check_resumable(folder.path, going(folder, 1))
    (folder.path / "summary.json").write_text('{"last_round": 2}')
    with pytest.raises(SettingError, match=r"^rounds: 2 is not possible; allowed: more than 2"):
        check_resumable(folder.path, going(folder, 2))


def test_a_round_is_read_as_it_was_written(folder: RunFolder) -> None:
    """With clients' own adapters, and with what was folded in the factors."""
    whole = folder.whole
    (layer, *_) = whole.complete
    a, b = whole.factors(layer)
    folded = LowRank(torch.randn(b.shape[0], 2), torch.randn(2, a.shape[1]))
    own = whole.with_tensors({name: tensor + 1 for name, tensor in whole.tensors.items()})
    folder.save_round(snapshot(1), dataclasses.replace(whole, folded={layer: folded}), {4: own})
    _leave_more_in(folder.path / "checkpoints" / "round-0001")
    back, personal = folder.read_round(1)
    assert list(personal) == [4]
    assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in personal[4].tensors.items())
    for name in whole.complete:
        expected = whole.change(name) + folded.to(torch.float64) if name == layer else whole.change(name)
        found = back.change(name)
        assert torch.allclose(found.up @ found.down, expected.up @ expected.down, atol=1e-6), name
    folder.save_result(back)
    round = folder.path / "checkpoints" / "round-0001"
    written, left = (load_file(place / "adapter_model.safetensors") for place in (round, folder.path / "adapter"))
    assert left.keys() == written.keys() and all(torch.equal(tensor, written[name]) for name, tensor in left.items())
    texts = [(place / "adapter_config.json").read_text() for place in (round, folder.path / "adapter")]
    assert [json.loads(text)["alpha_pattern"] for text in texts] == [{layer: 5}] * 2


def _leave_more_in(round: Path) -> None:
    """What somebody may put into a round's folder later: a note, and an adapter that no client has written."""
    (round / "notes.txt").write_text("the good one")
    (round / "personal").mkdir(exist_ok=True)
    adapter = {name: (round / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    (round / "personal" / "0009").mkdir()
    for name, content in adapter.items():
        (round / "personal" / "0009" / name).write_bytes(content)


def test_files_that_nobody_reads_stop_nobody(folder: RunFolder) -> None:
    """Neither a run that goes on nor one that comes to its end; the adapters are those that were written."""
    log(folder, {"round": 1})
    folder.save_round(snapshot(1), folder.whole)
    _leave_more_in(folder.path / "checkpoints" / "round-0001")
    check_resumable(folder.path, going(folder, 5))
    back, personal = folder.read_round(1)
    assert back.tensors.keys() == folder.whole.tensors.keys() and personal == {}
    (folder.path / "checkpoints" / "round-0001" / "adapter_config.json").unlink()
    with pytest.raises(SettingError, match=r"round-0001 is damaged: adapter_config\.json is not there"):
        check_resumable(folder.path, going(folder, 5))


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


def two_rounds(folder: RunFolder) -> None:
    for round in (1, 2):
        log(folder, {"round": round})
        folder.save_round(snapshot(round), folder.whole)


@pytest.mark.parametrize("file", ["state.safetensors", "adapter_model.safetensors", "state.json"])
def test_one_flipped_bit_is_found(folder: RunFolder, file: str) -> None:
    two_rounds(folder)
    path = folder.path / "checkpoints" / "round-0002" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(SettingError, match=rf"round-0002 is damaged: {re.escape(file)} is not as it was written"):
        check_resumable(folder.path, going(folder, 5))


def test_another_rounds_files_are_found(folder: RunFolder) -> None:
    """Its tensors alone, or all of it under a larger number."""
    two_rounds(folder)
    rounds = folder.path / "checkpoints"
    kept = (rounds / "round-0002" / "state.safetensors").read_bytes()
    shutil.copy(rounds / "round-0001" / "state.safetensors", rounds / "round-0002" / "state.safetensors")
    with pytest.raises(SettingError, match=r"round-0002 is damaged: state\.safetensors is not as it was written"):
        check_resumable(folder.path, going(folder, 5))
    (rounds / "round-0002" / "state.safetensors").write_bytes(kept)
    check_resumable(folder.path, going(folder, 5))
    shutil.copytree(rounds / "round-0001", rounds / "round-0003")
    with pytest.raises(SettingError, match=r"round-0003 is damaged: it is that of round 1\).*remove .*round-0003"):
        check_resumable(folder.path, going(folder, 5))


def test_what_clients_and_the_server_keep_elsewhere_is_known_too(folder: RunFolder) -> None:
    """Of the round that the server accepted; what a later attempt left is nothing of it."""
    log(folder, {"round": 1})
    FoldLog(folder.folds).append(1, {"x": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    store = ClientStore(folder.clients, 3)
    store.save(1, ClientState(personal={"y": torch.ones(2)}), 0)
    facts = {"after": 2.5, "accepted": {"3": 1, "4": 1}}
    folder.save_round(Snapshot(1, facts, {}), folder.whole)
    store.save(2, ClientState(personal={"y": torch.zeros(2)}), 1)
    FoldLog(folder.folds).append(2, {})
    check_resumable(folder.path, going(folder, 5))
    moved = folder.path.with_name("moved")
    shutil.copytree(folder.path, moved)
    check_resumable(moved, going(folder, 5))
    for name in ("clients/0003/round-0001.safetensors", "checkpoints/folds/round-0001.safetensors"):
        path = folder.path / name
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(SettingError, match=rf"^resume: .*\({name} is not as it was written\)"):
            check_resumable(folder.path, going(folder, 5))
        path.unlink()
        with pytest.raises(SettingError, match=rf"^resume: .*\({name} cannot be read"):
            check_resumable(folder.path, going(folder, 5))
        path.write_bytes(kept)
    check_resumable(folder.path, going(folder, 5))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"seed": 1}),
        ("cut", {"cut": "1:3"}),
        ("clients", {"clients": 4}),
        ("strategy", {"strategy": "flora"}),
        ("strategy.mu", {"strategy_options": {"mu": 0.5}}),
        ("trunk.schedule", {"trunk": TrunkSettings(schedule="copies")}),
        ("train.lr", {"train": TrainSettings(lr=0.5)}),
        ("lora.rank", {"lora": LoraSettings(rank=(2,), alpha=6.0)}),
        ("keep_best", {"keep_best": True}),
        ("data.text", {"data": DataSettings(text="body")}),
    ],
)
def test_a_setting_that_decides_the_result_is_named(folder: RunFolder, name: str, change: dict[str, Any]) -> None:
    two_rounds(folder)
    with pytest.raises(SettingError, match=rf"^{re.escape(name)}: .* is not possible; allowed: .*, with which the run"):
        check_resumable(folder.path, dataclasses.replace(going(folder, 5), **change))


def test_what_does_not_decide_the_result_may_change(folder: RunFolder) -> None:
    """How long the run lasts, what of the machine it uses, and where the same files lie."""
    two_rounds(folder)
    trunk = TrunkSettings(threads=2, lanes=2, memory="1GB", lease=9.0, device="cpu")
    other = dataclasses.replace(going(folder, 7), patience=3, workers=2, threads=3, device="auto", trunk=trunk)
    other = dataclasses.replace(other, data=DataSettings(show=True, held_out="elsewhere"), model="elsewhere")
    check_resumable(folder.path, other)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Content("others", CONTENT.model), r"^dataset: sotu \(other texts, or other tokens\) is not possible"),
        (Content("data", {**CONTENT.model, "model.safetensors": "x"}), r"^model: .* \(another model\.safetensors\)"),
        (Content("data", {"config.json": "one"}), r"^model: .* \(another model\.safetensors\)"),
        (Content("data", {**CONTENT.model, "more.safetensors": "x"}), r"^model: .* \(another more\.safetensors\)"),
    ],
)
def test_other_data_or_another_model_are_named(folder: RunFolder, content: Content, words: str) -> None:
    two_rounds(folder)
    check_content(folder.path, going(folder, 5), CONTENT)
    with pytest.raises(SettingError, match=words):
        check_content(folder.path, going(folder, 5), content)


def test_a_damaged_best_round_is_not_left_as_the_result(folder: RunFolder) -> None:
    """Nor does a run go on that may have to leave it."""
    log(folder, {"round": 1})
    folder._config = dataclasses.replace(folder._config, keep_best=True)
    for round in (1, 2):
        ClientStore(folder.clients, 0).save(round, ClientState(personal={"y": torch.ones(2)}), round)
        facts = {"after": float(round), "course": {"best": 1, "waited": 1}, "accepted": {"0": round}}
        folder.save_round(Snapshot(round, facts, {}), folder.whole)
    check_resumable(folder.path, going(folder, 5))  # what clients kept of the best round is gone, as it should be
    path = folder.path / "checkpoints" / "round-0001" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged, match=r"round-0001, the best round, is damaged: adapter_model\.safetensors is not"):
        folder.read_round(1)
    with pytest.raises(SettingError, match=r"round-0001 is damaged: adapter_model\.safetensors is not as it was"):
        check_resumable(folder.path, going(folder, 5))


@pytest.mark.parametrize("line", [b"{}\n", b'{"round": "x"}\n', b'{"rou\n', b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_a_damaged_event_is_named_by_its_line(folder: RunFolder, line: bytes) -> None:
    two_rounds(folder)
    metrics = folder.path / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + line + second)
    with pytest.raises(SettingError, match=r"^resume: .* \(metrics\.jsonl, line 2, is damaged\)"):
        check_resumable(folder.path, going(folder, 5))
    metrics.write_bytes(first + second + line.rstrip(b"\n") + b'{"ev')  # cut off as it was written
    check_resumable(folder.path, going(folder, 5))


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond some bytes: the system refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 700, 6000])
def test_what_there_was_before_a_full_disk_stays_whole(folder: RunFolder, limit: int) -> None:
    two_rounds(folder)
    folder.save_result(folder.whole)
    sum_up(folder, {"last_round": 2})
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    works = {
        "round-0003": lambda: folder.save_round(snapshot(3), folder.whole),
        "round-0002": lambda: folder.save_round(snapshot(2), folder.whole),
        "adapter": lambda: folder.save_result(folder.whole),
        "summary.json": lambda: sum_up(folder, {"last_round": 3, "more": "x" * 7000}),
        "data.json": lambda: folder.save_data({"clients": ["x" * 7000]}),
    }
    for name, work in works.items():
        with full_disk(limit), pytest.raises(NotWritten, match=rf"{name}\S* could not be written \(.*File too large"):
            work()
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    check_resumable(folder.path, going(folder, 5))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b'{"rou'),
        ("state.json", b"{}"),
        ("state.safetensors", b"x" * 30),
        ("state.json", None),
        ("adapter_model.safetensors", None),
        ("manifest.json", None),
        ("manifest.json", b"[]"),
        ("manifest.json", b'{"round": 2}'),
    ],
)
def test_a_damaged_checkpoint_is_named(folder: RunFolder, file: str, content: bytes | None) -> None:
    two_rounds(folder)
    path = folder.path / "checkpoints" / "round-0002" / file
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(SettingError, match=r"round-0002 is damaged: .*remove .*round-0002 to go on") as caught:
        check_resumable(folder.path, going(folder, 5))
    assert "\n" not in str(caught.value)
    for inside in path.parent.iterdir():
        inside.unlink()
    path.parent.rmdir()
    check_resumable(folder.path, going(folder, 5))


def test_the_last_round_is_the_one_with_the_largest_number(tmp_path: Path) -> None:
    for number in ("0001", "9999", "10000", "x", "99999-old", "²"):
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
            RunFolder(folder.path, config, folder._family, BLOCKS, CONTENT)
        other.kill()
    RunFolder(folder.path, config, folder._family, BLOCKS, CONTENT)
