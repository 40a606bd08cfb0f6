"""The run's folder: complete, loadable, never half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import OpenedFolder, again, checkpoints, config_of, going, log, opened, play, snapshot
from safetensors.torch import load_file, save_file

from fedsplit.durable import NotWritten
from fedsplit.errors import SettingError
from fedsplit.events import RunEnded
from fedsplit.events.run_files import SummaryFile
from fedsplit.federation import manifest
from fedsplit.federation.checkpoint import Snapshot, check_folder
from fedsplit.federation.manifest import Damaged
from fedsplit.federation.resumption import check_resumable, newest_checkpoint
from fedsplit.lowrank import LowRank
from fedsplit.settings.flags import parse
from fedsplit.settings.sections import CheckpointSettings
from fedsplit.state.client_store import ClientState, ClientStore
from fedsplit.state.fold_log import FoldLog
from fedsplit.tensor_files import write_tensors


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> OpenedFolder:
    return opened(tmp_path / "run", config_of(tiny_models["gpt2"]))


def sum_up(folder: OpenedFolder, summary: dict[str, Any]) -> None:
    SummaryFile(folder.path).handle(RunEnded(summary=summary, folder=str(folder.path)))


def test_the_configuration_written_is_the_one_that_ran(folder: OpenedFolder) -> None:
    assert parse(["--config", str(folder.path / "config.toml")]) == folder._config


def test_a_folder_that_another_run_made_meanwhile_is_refused_and_left_as_it_is(folder: OpenedFolder) -> None:
    before = (folder.path / "config.toml").read_text()
    with pytest.raises(SettingError, match="there already"):
        opened(folder.path, dataclasses.replace(folder._config, rounds=9))
    assert (folder.path / "config.toml").read_text() == before


def test_a_finished_run_has_every_file_and_each_part_its_own_blocks(folder: OpenedFolder) -> None:
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


def test_a_crash_while_writing_leaves_no_checkpoint(folder: OpenedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        folder.save_round(snapshot(1), folder.whole)
    assert not (folder.path / "checkpoints" / "round-0001").exists()
    monkeypatch.undo()
    folder.save_round(snapshot(1), folder.whole)
    assert (folder.path / "checkpoints" / "round-0001" / "adapter_config.json").exists()


def test_a_run_goes_on_from_its_last_whole_round(folder: OpenedFolder) -> None:
    """What came after it, or was cut off in the middle of a line, is dropped."""
    assert folder.snapshot() is None
    for round in (1, 2):
        log(folder, {"event": "train", "round": round})
        folder.save_round(snapshot(round), folder.whole)
    log(folder, {"event": "train", "round": 3})
    (folder.path / "checkpoints" / ".round-0003.draft").mkdir()
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "evaluate", "rou')
    found = again(folder).snapshot()
    assert found is not None
    assert (found.round, found.facts["after"]) == (2, 3.5)
    assert torch.equal(found.groups["adapters"]["x"], torch.full((2,), 2.0))
    events = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events] == [1, 2]
    assert parse(["--config", str(folder.path / "config.toml")]).rounds == 9


def test_a_round_is_read_as_it_was_written(folder: OpenedFolder) -> None:
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


def test_a_damaged_best_round_is_not_left_as_the_result(folder: OpenedFolder) -> None:
    play(folder, 1, 2)
    path = folder.path / "checkpoints" / "round-0001" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged, match=r"round-0001, the best round, is damaged: adapter_model\.safetensors is not"):
        folder.read_round(1)


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
def test_what_there_was_before_a_full_disk_stays_whole(folder: OpenedFolder, limit: int) -> None:
    play(folder, 1, 2)
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


def test_a_folder_that_a_run_is_at_work_in_is_refused_until_that_run_is_gone(folder: OpenedFolder) -> None:
    """However it ends: nothing of it has to be removed."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    config = dataclasses.replace(folder._config, resume=str(folder.path))
    folder._lock.close()
    call = [sys.executable, "-c", hold, str(folder.path / "checkpoints" / ".lock")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(SettingError, match=r"^resume: .* is not possible; allowed: .* not at work any more$"):
            opened(folder.path, config)
        other.kill()
    opened(folder.path, config)


def kept(path: Path, model: Path, **checkpoint: int) -> OpenedFolder:
    """Returns a run's folder with settings of its checkpoints."""
    return opened(path, config_of(model, checkpoint=CheckpointSettings(**checkpoint)))


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """500 rounds do not fill a disk: the number of checkpoints stays the same."""
    for keep in (1, 2, 3):
        folder = kept(tmp_path / f"run-{keep}", tiny_models["gpt2"], keep=keep)
        losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.0, 6: 4.0}
        for round, loss in losses.items():
            play(folder, round, after=loss)
            newest = [number for number in range(1, round + 1)][-keep:]
            best = 1 if round == 1 else 2
            assert checkpoints(folder) == sorted({*newest, best}), (keep, round)
        assert list((folder.path / "checkpoints").glob(".*.removed")) == []
    assert [*CheckpointSettings().__dict__.values()] == [1, 2]


def test_what_is_best_is_known_when_a_run_goes_on(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = kept(tmp_path / "run", tiny_models["gpt2"], keep=1)
    play(folder, 1, after=1.0)
    play(folder, 2, 3, after=2.0)
    assert checkpoints(folder) == [1, 3]
    on = again(folder)
    play(on, 4, after=2.0)
    assert checkpoints(on) == [1, 4]


def test_all_checkpoints_are_kept_where_a_run_says_so(folder: OpenedFolder) -> None:
    play(folder, *range(1, 6))
    assert checkpoints(folder) == [1, 2, 3, 4, 5]


def test_rounds_with_a_checkpoint(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Every N rounds, the last one, and the best one where a run may leave it."""
    folder = kept(tmp_path / "run", tiny_models["gpt2"], every=3)
    assert [round for round in range(1, 9) if folder.is_due(round, round == 8, round == 2)] == [3, 6, 8]
    config = config_of(tiny_models["gpt2"], checkpoint=CheckpointSettings(every=3), keep_best=True)
    folder = opened(tmp_path / "best", config)
    assert [round for round in range(1, 9) if folder.is_due(round, round == 8, round == 2)] == [2, 3, 6, 8]


def test_clients_keep_what_kept_checkpoints_go_back_to_and_nothing_else(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """A client that trains in every second round only, with two checkpoints and the best one, which is the third."""
    folder = kept(tmp_path / "run", tiny_models["gpt2"], keep=2)
    store = ClientStore(folder.clients, 0)
    accepted = 0
    for round in range(1, 10):
        if round % 2:
            store.save(round, ClientState(personal={"y": torch.full((2,), round)}), accepted, folder.rounds_needed(0))
            accepted = round
        log(folder, {"event": "train", "round": round})
        facts = {"after": abs(round - 3.0), "accepted": {"0": accepted}}
        folder.save_round(Snapshot(round, facts, {}), folder.whole)
        for number in checkpoints(folder):  # each of them could be gone on from
            going_back = number if number % 2 else number - 1
            assert store.load(going_back).personal["y"][0] == going_back, (round, number)
    assert checkpoints(folder) == [3, 8, 9]
    assert folder.rounds_needed(0) == (3, 7, 9) and folder.rounds_needed(1) == ()
    store.save(11, ClientState(personal={"y": torch.ones(2)}), 9, folder.rounds_needed(0))
    assert sorted(path.name[6:10] for path in (folder.clients / "0000").iterdir()) == ["0003", "0007", "0009", "0011"]
    on = again(folder, going(folder, 20))
    assert on.rounds_needed(0) == (3, 7, 9)


class FullDisk:
    """Fails from the n-th change of the disk on, as a full or a read-only one does.

    The system reports each change that Python makes; what safetensors writes counts as one more.
    """

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

    def __init__(self, code: int) -> None:
        self.code = code
        self.root = ""
        self.left: int | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hear)  # there is no way to remove it; it rests unless `left` is set

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is None:
            return
        is_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event in self.CHANGES) and str(args[0]).startswith(self.root):
            self.change(f"{event} {args[0]}")

    def change(self, what: str) -> None:
        self.seen.append(what)
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))
        assert self.left is not None
        self.left -= 1

    @contextlib.contextmanager
    def after(self, changes: int, root: Path) -> Iterator[None]:
        """Allows some changes below a folder, and none after them."""
        self.root = str(root)
        self.left = changes
        self.seen = []
        try:
            yield
        finally:
            self.left = None


DISKS = {code: FullDisk(code) for code in (errno.ENOSPC, errno.EROFS)}


@pytest.mark.parametrize("code", DISKS)
def test_a_disk_that_fails_at_any_change_costs_the_checkpoint_and_nothing_else(
    code: int, tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first change fails, then the second, and so on; what the folder has is valid each time, and goes on."""
    disk = DISKS[code]

    def save(tensors: Any, path: Any, metadata: Any = None) -> None:
        if disk.left is not None:
            disk.change(f"save {path}")
        save_file(tensors, path, metadata)

    for module in ("fedsplit.tensor_files", "fedsplit.adaptation.adapter_files"):
        monkeypatch.setattr(f"{module}.save_file", save)
    folder = kept(tmp_path / "run", tiny_models["gpt2"], keep=1)
    play(folder, 1, 2, after=1.0)
    facts = {"after": 0.5, "course": {"best": 3, "waited": 0}}
    for allowed in range(100):
        before = newest_checkpoint(folder.path, False).newest
        assert before is not None
        with disk.after(allowed, folder.path):
            try:
                folder.save_round(snapshot(before.round + 1, **facts), folder.whole, {0: folder.whole})
            except NotWritten as error:
                assert os.strerror(code) in str(error) and str(folder.path) in str(error)
            else:
                break
        found = newest_checkpoint(folder.path, False)
        assert found.newest is not None and found.skipped == (), disk.seen[-1]
        assert found.newest.round >= before.round
    assert 15 < allowed < 99, "a checkpoint makes this many changes of the disk"
    assert checkpoints(folder)[-1] == before.round + 1


def test_the_best_round_is_left_though_its_checkpoint_could_not_be_written(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """It stays in memory, and is written before the next checkpoint, which needs it."""
    folder = opened(tmp_path / "run", config_of(tiny_models["gpt2"], keep=1, keep_best=True))
    play(folder, 1, course={"best": 1})
    best = {"course": {"best": 2}, "accepted": {"0": 2}}
    with full_disk(700), pytest.raises(NotWritten):
        folder.save_round(snapshot(2, **best), folder.whole, {0: folder.whole})
    back, personal = folder.read_round(2)
    assert back is folder.whole and list(personal) == [0] and folder.read_facts(2)["after"] == 3.5
    assert folder.rounds_needed(0) == (2,)
    with full_disk(700), pytest.raises(NotWritten):
        folder.save_round(snapshot(3, course={"best": 2}), folder.whole)
    assert checkpoints(folder) == [1]
    folder.save_round(snapshot(4, course={"best": 2}), folder.whole)
    assert checkpoints(folder) == [1, 2, 4]
    assert folder.read_round(2)[0].tensors.keys() == folder.whole.tensors.keys()
    assert newest_checkpoint(folder.path, True).newest is not None


def test_text_and_drafts_that_a_killed_run_left_are_removed(folder: OpenedFolder) -> None:
    play(folder, 1)
    for client in range(3):
        write_tensors(folder.clients / "data" / f"{client:04d}.safetensors", {"ids": torch.zeros(2)})
    (folder.clients / "data" / f".{2:04d}.safetensors.77.draft").write_text("half of it")
    (folder.path / "checkpoints" / ".round-0002.draft").mkdir()
    (folder.path / "checkpoints" / ".round-0002.draft" / "state.json").write_text("{}")
    (folder.path / "checkpoints" / ".round-0001.removed").mkdir()
    (folder.path / ".summary.json.5.draft").write_text("")
    on = again(folder)
    assert on.notes == [f"removed the text of 3 clients, which a killed run had left in {folder.clients}"]
    assert not on.clients.exists()
    assert [path.name for path in folder.path.rglob(".*")] == [".lock"]


def test_a_folder_that_is_there_says_how_its_run_goes_on(folder: OpenedFolder, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"stopped before its first checkpoint, which --resume \S+ begins again"):
        check_folder(folder.path)
    play(folder, 1)
    with pytest.raises(SettingError, match=r"^out: \S+ \(there already, with a run that --resume \S+ goes on with\)"):
        check_folder(folder.path)


def test_what_a_kill_in_the_first_moment_leaves_is_free(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".lock").touch()
    (tmp_path / "run" / ".config.toml.7.draft").touch()
    check_folder(tmp_path / "run")
    play(opened(tmp_path / "run", config_of(tiny_models["gpt2"])), 1)


def test_digests_of_files_elsewhere_are_taken_once_and_forgotten_with_the_files(
    folder: OpenedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds of all rounds are in every manifest; what a client kept of earlier rounds is in none."""
    taken: list[str] = []
    real = manifest.digest

    def counting(path: Path) -> str:
        taken.append(str(path.relative_to(folder.path)))
        return real(path)

    monkeypatch.setattr(manifest, "digest", counting)
    store = ClientStore(folder.clients, 0)
    for round in range(1, 6):
        FoldLog(folder.folds).append(round, {"x": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
        store.save(round, ClientState(personal={"y": torch.ones(2)}), round - 1, ())
        play(folder, round, accepted={"0": round})
    folds = [name for name in taken if name.startswith("checkpoints/folds")]
    assert len(folds) == len(set(folds)) == 5
    assert len(folder._digests) == 5 + 1
