"""The newest valid checkpoint is found, what is not valid is named, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import CONTENT, again, checkpoints, config_of, going, log, opened, play

from fedsplit.errors import SettingError
from fedsplit.federation import manifest, resumption
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.manifest import Content, code_of, content_of
from fedsplit.federation.resumption import (
    check_content,
    check_resumable,
    checkpoints_of,
    how_to_go_on,
    newest_checkpoint,
    notes_on,
)
from fedsplit.lowrank import LowRank
from fedsplit.settings.sections import CheckpointSettings, DataSettings, LoraSettings, TrainSettings, TrunkSettings
from fedsplit.state.client_store import ClientState, ClientStore
from fedsplit.state.fold_log import FoldLog


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> RunFolder:
    return opened(tmp_path / "run", config_of(tiny_models["gpt2"]))


def newest(folder: RunFolder) -> tuple[int | None, tuple[str, ...]]:
    """Returns the round of the newest valid checkpoint, and the lines about those that are skipped."""
    search = newest_checkpoint(folder.path, folder._config.keep_best)
    return search.newest and search.newest.round, search.skipped


def rich_round(folder: RunFolder, round: int) -> None:
    """Writes a checkpoint with all that one may go back to: clients' own adapters, changes, and clients' state."""
    log(folder, {"event": "train", "round": round})
    FoldLog(folder.folds).append(round, {"x": LowRank(torch.ones(2, 1) * round, torch.ones(1, 2))})
    FoldLog(folder.clients / "folds").append(round, {"x": LowRank(torch.ones(2, 1) * round, torch.ones(1, 2))})
    store = ClientStore(folder.clients, 3)
    store.save(round, ClientState(personal={"y": torch.ones(2) * round}), round - 1, folder.rounds_needed(3))
    facts = {"after": 2.5 / round, "accepted": {"3": round, "4": round}, "course": {"best": round, "waited": 0}}
    whole = folder.whole  # type: ignore[attr-defined]
    folder.save_round(Snapshot(round, facts, {"adapters": {"x": torch.ones(2) * round}}), whole, {3: whole})


ROUND_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "personal/0003/adapter_config.json",
    "personal/0003/adapter_model.safetensors",
    "state.json",
    "state.safetensors",
)

ELSEWHERE = (
    "clients/0003/round-0002.safetensors",
    "clients/folds/round-0002.safetensors",
    "checkpoints/folds/round-0002.safetensors",
)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, cut, empty, Path.unlink, replace_by_folder)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_of_a_checkpoint_leads_to_the_one_before(
    folder: RunFolder, damage: Callable[[Path], None]
) -> None:
    """Every file is damaged in turn; the line names the checkpoint and the file, and the run goes on from round 1."""
    rich_round(folder, 1)
    rich_round(folder, 2)
    newer = folder.path / "checkpoints" / "round-0002"
    assert sorted(str(path.relative_to(newer)) for path in newer.rglob("*") if path.is_file()) == [*ROUND_FILES]
    assert newest(folder) == (2, ())
    for name in (*(f"checkpoints/round-0002/{name}" for name in ROUND_FILES), *ELSEWHERE):
        path = folder.path / name
        content = path.read_bytes()
        damage(path)
        round, skipped = newest(folder)
        assert round == 1, name
        assert len(skipped) == 1 and "\n" not in skipped[0]
        assert re.match(rf"round-0002 is skipped: .*{re.escape(path.name)}", skipped[0]), skipped
        check_resumable(folder.path, going(folder, 5))
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    assert newest(folder) == (2, ())


def test_every_bit_of_a_manifest_counts(folder: RunFolder) -> None:
    """A manifest that was changed is found out where it says something else, and never raises anything of its own."""
    rich_round(folder, 1)
    rich_round(folder, 2)
    path = folder.path / "checkpoints" / "round-0002" / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        assert newest(folder)[0] == 1, (place, bytes(spoilt[max(0, place - 20) : place + 20]))


def test_a_run_goes_on_from_the_newest_valid_checkpoint_and_says_what_it_skipped(folder: RunFolder) -> None:
    play(folder, 1, 2, 3, 4)
    flip(folder.path / "checkpoints" / "round-0004" / "state.safetensors")
    (folder.path / "checkpoints" / "round-0003" / "manifest.json").unlink()
    on = again(folder)
    assert on.notes == [
        "round-0004 is skipped: state.safetensors is not as it was written",
        "round-0003 is skipped: it has no manifest.json, without which nobody knows whether it is whole",
    ]
    found = on.snapshot()
    assert found is not None and found.round == 2
    assert torch.equal(found.groups["adapters"]["x"], torch.full((2,), 2.0))
    assert [json.loads(line)["round"] for line in (on.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    play(on, 3)  # the damaged one is written anew, and the one that belongs to no round of this run goes
    assert checkpoints(on) == [1, 2, 3]
    assert newest(on) == (3, ())


def test_a_run_without_a_valid_checkpoint_is_refused_in_one_line(folder: RunFolder) -> None:
    play(folder, 1, 2)
    for round in (1, 2):
        cut(folder.path / "checkpoints" / f"round-000{round}" / "state.json")
    words = r"^resume: .*round-0002 is skipped: state\.json.*; round-0001 is skipped: state\.json.*remove .* to begin"
    for attempt in (lambda: check_resumable(folder.path, going(folder, 5)), lambda: again(folder)):
        with pytest.raises(SettingError, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_under_keep_best_the_best_round_is_needed_too(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = opened(tmp_path / "run", config_of(tiny_models["gpt2"], keep_best=True))
    for round, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        play(folder, round, course={"best": best, "waited": round - best})
    assert newest(folder) == (4, ())
    flip(folder.path / "checkpoints" / "round-0002" / "adapter_model.safetensors")
    round, skipped = newest(folder)
    assert round == 1 and len(skipped) == 3
    assert skipped[0] == (
        "round-0004 is skipped: round 2, the best until then, is damaged: "
        "adapter_model.safetensors is not as it was written"
    )


def test_what_cannot_go_on_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text("")
    for path in (tmp_path / "mine", tmp_path / "nowhere"):
        with pytest.raises(SettingError, match=r"^resume: .*allowed: the folder of a run, with its config\.toml and"):
            check_resumable(path, going(folder, 5))
    play(folder, 1, 2)
    check_resumable(folder.path, going(folder, 3))
    check_resumable(folder.path, going(folder, 2))  # killed before it was summed up
    with pytest.raises(SettingError, match=r"^rounds: 1 is not possible; allowed: more than 2"):
        check_resumable(folder.path, going(folder, 1))
    (folder.path / "summary.json").write_text('{"last_round": 2}')
    with pytest.raises(SettingError, match=r"^rounds: 2 is not possible; allowed: more than 2"):
        check_resumable(folder.path, going(folder, 2))
    (folder.path / "metrics.jsonl").unlink()
    with pytest.raises(SettingError, match=r"^resume: .* \(metrics\.jsonl is not there\)"):
        check_resumable(folder.path, going(folder, 3))


def test_a_run_stopped_before_its_first_checkpoint_begins_again(folder: RunFolder) -> None:
    """Nothing that its first round left is taken for a state."""
    log(folder, {"event": "evaluate", "round": 0})
    ClientStore(folder.clients, 0).save(1, ClientState(personal={"y": torch.ones(2)}), 0)
    FoldLog(folder.clients / "folds").append(1, {})
    FoldLog(folder.folds).append(1, {})
    check_resumable(folder.path, going(folder, 5))
    check_content(folder.path, going(folder, 5), CONTENT)
    on = again(folder)
    assert on.notes == ["the run was stopped before its first checkpoint, and begins again"]
    assert on.snapshot() is None
    left = {str(path.relative_to(on.path)) for path in on.path.rglob("*") if path.is_file()}
    assert left == {"config.toml", "checkpoints/.lock"}


def test_other_versions_are_a_line_and_no_refusal(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    play(folder, 1)
    before = manifest.read(folder.path / "checkpoints" / "round-0001").versions
    assert {"python", "torch", "transformers", "peft"} <= before.keys()
    search = newest_checkpoint(folder.path, False)
    assert notes_on(search) == []
    now = {**before, "torch": "99.0"}
    del now["peft"]
    monkeypatch.setattr(resumption, "versions", lambda: now)
    (line,) = notes_on(search)
    assert line == (
        "other versions than in round 1, so that numbers may differ: "
        f"torch {before['torch']} -> 99.0, peft {before['peft']} -> none"
    )
    check_resumable(folder.path, going(folder, 5))


def test_another_rounds_files_are_found(folder: RunFolder) -> None:
    """Its tensors alone, or all of it under a larger number."""
    play(folder, 1, 2)
    rounds = folder.path / "checkpoints"
    kept = (rounds / "round-0002" / "state.safetensors").read_bytes()
    shutil.copy(rounds / "round-0001" / "state.safetensors", rounds / "round-0002" / "state.safetensors")
    assert newest(folder) == (1, ("round-0002 is skipped: state.safetensors is not as it was written",))
    (rounds / "round-0002" / "state.safetensors").write_bytes(kept)
    shutil.copytree(rounds / "round-0001", rounds / "round-0003")
    assert newest(folder) == (2, ("round-0003 is skipped: it is that of round 1",))


def test_a_run_whose_folder_has_moved_goes_on(folder: RunFolder) -> None:
    """With what clients and the server keep; what a later attempt left there is nothing of the checkpoint."""
    rich_round(folder, 1)
    ClientStore(folder.clients, 3).save(2, ClientState(personal={"y": torch.zeros(2)}), 1)
    FoldLog(folder.folds).append(2, {})
    moved = folder.path.with_name("moved")
    shutil.copytree(folder.path, moved)
    check_resumable(moved, going(folder, 5))


def test_files_that_nobody_reads_stop_nobody(folder: RunFolder) -> None:
    play(folder, 1)
    (folder.path / "checkpoints" / "round-0001" / "notes.txt").write_text("the good one")
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
    play(folder, 1, 2)
    with pytest.raises(SettingError, match=rf"^{re.escape(name)}: .* is not possible; allowed: .*, with which the run"):
        check_resumable(folder.path, dataclasses.replace(going(folder, 5), **change))


def test_what_does_not_decide_the_result_may_change(folder: RunFolder) -> None:
    """How long the run lasts, what of the machine and of the disk it uses, and where the same files lie."""
    play(folder, 1, 2)
    trunk = TrunkSettings(threads=2, lanes=2, memory="1GB", lease=9.0, device="cpu")
    other = dataclasses.replace(going(folder, 7), patience=3, workers=2, threads=3, device="auto", trunk=trunk)
    other = dataclasses.replace(other, data=DataSettings(show=True, held_out="elsewhere"), model="elsewhere")
    other = dataclasses.replace(other, checkpoint=CheckpointSettings(every=3, keep=1))
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
    play(folder, 1, 2)
    check_content(folder.path, going(folder, 5), CONTENT)
    with pytest.raises(SettingError, match=words):
        check_content(folder.path, going(folder, 5), content)


@pytest.mark.parametrize(
    ("setting", "spec"),
    [
        ("strategy", "mine.py:Mine"),
        ("objective", "mine.py:mine"),
        ("metric", ("token_accuracy", "mine.py:mine")),
    ],
)
def test_code_of_the_users_that_was_edited_is_named(
    setting: str,
    spec: str | tuple[str, ...],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_models["gpt2"]
    config = config_of(model, **{setting: spec})

    def content() -> Content:
        return content_of([], model, model, code=code_of(config))

    Path("mine.py").write_text("one = 1")
    folder = opened(tmp_path / "run", config, content())
    play(folder, 1, 2)
    check_content(folder.path, going(folder, 5), content())
    Path("mine.py").write_text("one = 2")
    words = (
        rf"^{setting}: mine\.py \(edited since\) is not possible; allowed: the code with which the run in .* round 2; "
        rf"with other code begin another run: --init-adapter {folder.path}/checkpoints/round-0002$"
    )
    with pytest.raises(SettingError, match=words):
        check_content(folder.path, going(folder, 5), content())


def test_code_that_an_earlier_version_did_not_look_at_may_be_any(folder: RunFolder, tmp_path: Path) -> None:
    play(folder, 1)
    mine = tmp_path / "mine.py"
    mine.write_text("one = 1")
    content = dataclasses.replace(CONTENT, code={"strategy": manifest.digest(mine)})
    check_content(folder.path, going(folder, 5, strategy=f"{mine}:Mine"), content)


def test_how_to_go_on_is_said_of_the_last_checkpoint(folder: RunFolder) -> None:
    begins, goes_on = f"--resume {folder.path} begins again", f"--resume {folder.path} goes on"
    assert how_to_go_on(folder.path) == f"nothing is saved yet: python -m fedsplit.simulate {begins}"
    assert how_to_go_on(folder.path, only_from_checkpoint=True) == ""
    play(folder, 1, 2)
    last = f"the last checkpoint is {folder.path}/checkpoints/round-0002: python -m fedsplit.simulate {goes_on}"
    assert how_to_go_on(folder.path) == how_to_go_on(folder.path, only_from_checkpoint=True) == last
    assert how_to_go_on(None) == "nothing is saved yet" and how_to_go_on(None, only_from_checkpoint=True) == ""


@pytest.mark.parametrize("line", [b"{}\n", b'{"round": "x"}\n', b'{"rou\n', b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_a_damaged_event_is_named_by_its_line(folder: RunFolder, line: bytes) -> None:
    play(folder, 1, 2)
    metrics = folder.path / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + line + second)
    with pytest.raises(SettingError, match=r"^resume: .* \(metrics\.jsonl, line 2, is damaged\)"):
        check_resumable(folder.path, going(folder, 5))
    metrics.write_bytes(first + second + line.rstrip(b"\n") + b'{"ev')  # cut off as it was written
    check_resumable(folder.path, going(folder, 5))


def test_checkpoints_are_in_the_order_of_their_rounds(tmp_path: Path) -> None:
    for number in ("0001", "9999", "10000", "x", "99999-old", "²"):
        (tmp_path / "checkpoints" / f"round-{number}").mkdir(parents=True)
    assert [*checkpoints_of(tmp_path)] == [1, 9999, 10000]
