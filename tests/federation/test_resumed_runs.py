"""A run that goes on after any of its rounds is the run that never stopped, to the bit."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_round import without_times

from fedsplit.engines.in_process import federate
from fedsplit.errors import SettingError
from fedsplit.events import Event, Notice, Progress, RoundEnded, Sink
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.resumption import check_resumable
from fedsplit.federation.round import Round
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "training": (
        "fedavg",
        {
            "trunk.schedule": "copies",
            "train.optimizer": "sgd",
            "train.momentum": 0.9,
            "train.optimizer_state": "keep",
            "train.schedule": "cosine",
            "train.warmup": 0.2,
            "patience": 2,
            "keep_best": True,
        },
    ),
    "shared": ("fedavg", {"train.optimizer_state": "keep", "train.schedule": "linear", "checkpoint.keep": 1}),
    "personal": ("fedsa", {"trunk.schedule": "copies", "share": "bottom,trunk", "train.optimizer_state": "keep"}),
    "ditto": ("tests/own_stages.py:Ditto", {"trunk.schedule": "copies", "lora.dropout": 0.0}),
    "server": ("fedadam", {"trunk.schedule": "copies", "checkpoint.every": 2}),
    "control": ("scaffold", {"trunk.schedule": "copies", "checkpoint.every": 2, "fraction": 0.5}),
    "folds": ("flora", {"trunk.schedule": "copies"}),
}
"""Strategies and settings by what of a run's memory they are about; all have dropout but the one that cannot."""

ALWAYS = ("training", "personal")
"""Cases that the fast tests play."""

ROUNDS = 4


def config_of(case: str, model: Path, corpus: Path) -> Config:
    name, settings = CASES[case]
    values: dict[str, Any] = {"clients": 2, "rounds": ROUNDS, "model": str(model), "cut": "1:2", "dataset": str(corpus)}
    values |= {"partition": "iid", "lora.rank": 2, "train.steps": 2, "train.batch_size": 2, "train.max_length": 16}
    values |= {"train.lr": 0.02, "eval.samples": 2, "eval.after": 1, "strategy": name, "engine": "local"}
    return build(values | settings)


def run(config: Config, out: Path, *sinks: Sink) -> None:
    federate(config, out, load_strategy(config.strategy, {}, strategy_defaults(config)), *sinks)


class After(Sink):
    """Calls a function with the number of each round that is over."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call
        self.notices: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, RoundEnded):
            self.call(event.round)
        if isinstance(event, Notice):
            self.notices.append(event.text)


def left(out: Path) -> dict[str, Any]:
    """Returns what a run leaves: tensors by their bytes, state and events as values.

    Without what counts messages: after a resume the server does not know which tensors clients hold, and sends them.
    """
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors" and "data" not in path.parts:
            found[name] = path.read_bytes()
        elif path.name == "state.json":
            facts = json.loads(path.read_text())
            del facts["tally"]
            found[name] = facts
        elif path.name == "metrics.jsonl":
            events = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
            for event in events:
                for counts in ("bytes", "client_bytes", "adapter_bytes"):
                    event.pop(counts, None)
            found[name] = events
    return found


def assert_same(out: Path, expected: dict[str, Any]) -> None:
    found = left(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize(
    "case", [case if case in ALWAYS else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_run_that_goes_on_after_any_round_is_the_run_that_never_stopped(
    case: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """After each round, before the first one, and with the newest checkpoint damaged: the same bytes."""
    config = config_of(case, tiny_models["gpt2"], corpus_file)
    straight = tmp_path / "straight"
    # As a kill leaves it: clients' text is still there.
    run(config, straight, After(lambda round: shutil.copytree(straight, tmp_path / f"after-{round}")))
    expected = left(straight)
    stopped = sorted(tmp_path.glob("after-*"))
    assert len(stopped) >= 3

    for out in stopped[:-1]:
        damaged = shutil.copytree(out, tmp_path / f"damaged-{out.name}")
        told = After(lambda round: None)
        check_resumable(out, config)
        run(replace(config, resume=str(out)), out, told)
        assert_same(out, expected)
        assert any(text.startswith("removed the text of 2 clients") for text in told.notices)

        checkpoints = sorted((damaged / "checkpoints").glob("round-*"))
        if not checkpoints:
            assert "the run was stopped before its first checkpoint, and begins again" in told.notices
            continue
        spoilt = checkpoints[-1] / "state.safetensors"
        spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"?")
        if len(checkpoints) == 1:
            with pytest.raises(SettingError, match=f"{spoilt.parent.name} is skipped"):
                check_resumable(damaged, config)
            continue
        warned = After(lambda round: None)
        run(replace(config, resume=str(damaged)), damaged, warned)
        assert_same(damaged, expected)
        assert any(text.startswith(f"{spoilt.parent.name} is skipped: state.safetensors") for text in warned.notices)


@pytest.mark.parametrize("case", ["training", "folds", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_two_rounds_costs_two_checkpoints_and_nothing_else(
    case: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """No file can grow in rounds 2 and 3: the run goes on, and so does one that was killed meanwhile."""
    config = config_of(case, tiny_models["gpt2"], corpus_file)
    train = replace(config.train, optimizer_state="reset", momentum=0.0)  # clients have nothing to write
    config = replace(config, train=train, patience=0)
    run(config, tmp_path / "straight")
    expected = left(tmp_path / "straight")
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(round: int) -> None:
        if round == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        if round == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            shutil.copytree(out, tmp_path / "killed")

    told = After(fill)
    try:
        run(config, out, told)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    warnings = [text for text in told.notices if "no checkpoint, and the run goes on" in text]
    assert [text[:9] for text in warnings] == ["round 2/4", "round 3/4"]
    assert sum("metrics.jsonl could not be written" in text for text in told.notices) == 1
    found = left(out)
    results = {name: value for name, value in expected.items() if not name.startswith("checkpoints/round-")}
    assert {name: found[name] for name in results} == results
    last = "checkpoints/round-0004/state.safetensors"
    assert found[last] == expected[last]

    killed = tmp_path / "killed"
    assert [path.name for path in (killed / "checkpoints").glob("round-*")] == ["round-0001"]
    assert {event["round"] for event in left(killed)["metrics.jsonl"]} == {0, 1}
    run(replace(config, resume=str(killed)), killed)
    assert_same(killed, expected)


def test_a_run_keeps_few_checkpoints(tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path) -> None:
    """The newest two and the best one; and of clients' state no more than these need."""
    config = replace(config_of("personal", tiny_models["gpt2"], corpus_file), rounds=7)
    run(config, tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {event["round"]: event["loss"] for event in events if event["event"] == "evaluate" and event["round"]}
    best = min(losses, key=lambda round: losses[round])
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("round-*")}
    assert kept == {f"round-{round:04d}" for round in {6, 7, best}}
    for client in ("0000", "0001"):
        names = {path.name for path in (tmp_path / "run" / "clients" / client).iterdir()}
        assert {"round-0006.safetensors", "round-0007.safetensors"} <= names and len(names) <= 4


def test_clients_still_have_what_an_older_checkpoint_needs(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """Killed when both clients had trained in round 3, with the checkpoint of round 2 damaged: on from round 1."""
    config = config_of("personal", tiny_models["gpt2"], corpus_file)
    straight, out = tmp_path / "straight", tmp_path / "killed"

    class Copies(Sink):
        def handle(self, event: Event) -> None:
            if isinstance(event, Progress) and (event.phase, event.round, event.done) == ("training", 3, 2):
                shutil.copytree(straight, out)

    run(config, straight, Copies())
    (out / "checkpoints" / "round-0002" / "manifest.json").write_text("{}")
    told = After(lambda round: None)
    run(replace(config, resume=str(out)), out, told)
    assert any(text.startswith("goes on after round 1 ") for text in told.notices)
    assert_same(out, left(straight))


class Killed(BaseException):
    """Ends the command wherever it is, as kill -9 does: nothing catches it."""


STAGES = ("begin", "collect", "aggregate", "evaluate", "commit")


def points_of_death() -> list[tuple[str, bool]]:
    """Returns each stage of a round, before and after it, and each step of a checkpoint."""
    return [(stage, after) for stage in (*STAGES, "save_round", "write_folds") for after in (False, True)]


@pytest.mark.parametrize(
    "case", [case if case == "personal" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_command_that_dies_at_any_stage_goes_on_to_the_bit(
    case: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    config = replace(config_of(case, tiny_models["gpt2"], corpus_file), rounds=3, patience=0, keep_best=False)
    run(config, tmp_path / "straight")
    expected = left(tmp_path / "straight")
    for stage, after in points_of_death():
        out = tmp_path / f"{stage}-{after}"
        owner: Any = {"save_round": RunFolder, "write_folds": AdapterLedger}.get(stage, Round)
        work = getattr(owner, stage)
        calls = []

        def dies(*args: Any, work: Any = work, after: bool = after, calls: list[Any] = calls) -> Any:
            calls.append(args)
            if len(calls) == 2 and not after:
                raise Killed
            result = work(*args)
            if len(calls) == 2:
                raise Killed
            return result

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, stage, dies)
            run(config, out)
        assert len(calls) >= 1
        if not (out / "summary.json").exists():
            check_resumable(out, config)
            run(replace(config, resume=str(out)), out)
        assert_same(out, expected)
