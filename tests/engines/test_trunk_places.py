"""Where a run's trunk is: with a trunk at a server, every number is that of a trunk of the engine's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_corpus
from same_numbers import BASE, CASES, play
from served_trunks import offered

from fedsplit.engines import trunk_places
from fedsplit.engines.trunk_places import OwnPlace, ServerPlace, owner_of, place_of
from fedsplit.errors import SettingError
from fedsplit.federation.clients import FederationFailed
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk.run_terms import Begun
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import TrunkLost
from fedsplit.wire.typed_values import MalformedValue

ONE_AT_A_TIME = {"train.micro_batches": 1}
"""The trunk in this process computes while the client waits: both would draw from the process's random state."""


def config_of(case: str, models: dict[str, Path], corpus: Path) -> Config:
    """The settings with which `play` plays a case."""
    values = {**BASE, "dataset": str(corpus), **CASES[case], **ONE_AT_A_TIME}
    options = {name.partition(".")[2]: values.pop(name) for name in list(values) if name.startswith("strategy.")}
    values["model"] = str(models[str(values["model"])])
    return build(values, options)


def ledger(out: Path) -> Any:
    """Bytes and messages that crossed, by purpose."""
    summary = json.loads((out / "summary.json").read_text())
    return {name: value for name, value in summary.items() if "bytes" in name or "traffic" in name}


FAST = ("shared", "fold")

LEFT_OUT = ("batched", "resumed")
"""Under `batched`, who plays one client after the other would wait for deadlines of the machine's clock. The resumed
run has first fewer rounds than the trunk's settings, and is refused."""


@pytest.mark.parametrize(
    "case",
    [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in (*FAST, *LEFT_OUT))],
)
def test_a_trunk_at_a_server_changes_no_number(
    case: str, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an adapter, nor a checkpoint, nor a loss, nor a byte of the ledger."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # `play` and the trunk use one in any case
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    own = play(case, tiny_models, corpus, tmp_path / "own", ONE_AT_A_TIME)
    with offered(config_of(case, tiny_models, corpus), tmp_path / "token") as (settings, trunk):
        there = play(case, tiny_models, corpus, tmp_path / "there", {**ONE_AT_A_TIME, **settings})
        assert trunk._packets > 0
    assert there == own
    assert ledger(tmp_path / "there") == ledger(tmp_path / "own") != {}


class Servers:
    """A server that replies in turn, or raises errors."""

    def __init__(self, *outcomes: Begun | Exception) -> None:
        self.outcomes = list(outcomes)
        self.patience: list[float] = []
        self.owners: list[str] = []

    def dial_of(self, config: Config, patience: float | None = None) -> Any:
        if patience is not None:
            self.patience.append(patience)
        return None

    def begin_run(self, dial: Any, terms: Any, owner: str) -> Begun:
        self.owners.append(owner)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


Place = Callable[..., tuple[ServerPlace, Servers]]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    def make(*outcomes: Begun | Exception) -> tuple[ServerPlace, Servers]:
        from fedsplit.trunk import dialing, remote

        servers = Servers(*outcomes)
        monkeypatch.setattr(dialing, "dial_of", servers.dial_of)
        monkeypatch.setattr(remote, "begin_run", servers.begin_run)
        monkeypatch.setattr(trunk_places, "terms_of", lambda config: None)
        return ServerPlace(build({"trunk.server": "127.0.0.1:1", "trunk.wait": 77})), servers

    return make


def test_a_run_begins_once_more_at_the_same_server(place: Place) -> None:
    """With little patience at the start, and with that of the settings after a loss."""
    made, servers = place(Begun("first", "a"), TrunkLost("still down"), Begun("second", "b"))
    assert [made.begin()[0], made.begin()[0]] == ["first", "second"]
    assert [seconds for seconds in servers.patience if seconds > trunk_places._LAST_SECONDS] == [10.0, 77, 77]
    assert len({*servers.owners}) == 1 and len(servers.owners) == 3


def test_a_resumed_run_is_the_run_for_the_server_and_no_other_is(tmp_path: Path) -> None:
    def owner(**settings: str) -> str:
        return owner_of(build(settings))

    assert owner(out=str(tmp_path / "run")) == owner(out=str(tmp_path / "run"), resume=str(tmp_path / "run"))
    assert owner(out=str(tmp_path / "run")) != owner(out=str(tmp_path / "other"))
    assert owner() != owner()


def test_nobody_answers_as_the_run_starts(place: Place) -> None:
    made, _ = place(TrunkLost("connection refused"))
    with pytest.raises(TrunkLost, match=r"no trunk answers at 127.0.0.1:1 \(connection refused\); fedsplit serve"):
        made.begin()


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (NotTrusted("a wrong token"), r"a server that accepts this run \(a wrong token\)"),
        (MalformedValue("not a BeginRun"), r"a server that accepts this run \(not a BeginRun\)"),
        (Begun(differences=("seed (0 there)",)), r"a trunk with the settings of this run; these differ: seed"),
        (Begun(is_busy=True), r"a trunk that serves no other run now"),
    ],
    ids=["token", "version", "settings", "busy"],
)
def test_a_run_that_the_server_does_not_accept_is_the_users_fault_at_the_start_alone(
    outcome: Any, words: str, place: Place
) -> None:
    made, _ = place(outcome)
    with pytest.raises(SettingError, match=words):
        made.begin()
    made, _ = place(Begun("first", "a"), outcome)
    made.begin()
    with pytest.raises(FederationFailed, match=f"does not begin again: .*{words}"):
        made.begin()


def test_a_server_that_does_not_come_back_ends_the_run(place: Place) -> None:
    made, _ = place(Begun("first", "a"), *(TrunkLost("down") for _ in range(3)))
    made.begin()
    with pytest.raises(FederationFailed, match=r"the server at 127\.0\.0\.1:1 does not come back"):
        made.begin()


def test_without_a_server_every_trunk_of_the_engine_has_a_name_of_its_own() -> None:
    started: list[str] = []

    def start(name: str) -> Any:
        started.append(name)
        return f"trunk {name}"

    made = place_of(build({}), start)
    assert isinstance(made, OwnPlace)
    begun = [made.begin(), made.begin()]
    assert begun == [(name, f"trunk {name}") for name in started]
    assert len({*started}) == 2
