"""A question to clients: each reply is handed on as it arrives, and failures are named at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_parties import BRIEFING, gather

from fedsplit.federation.attempts import Attempt
from fedsplit.federation.clients import ClientNode
from fedsplit.federation.messages import TRUNK_LOST, Answer, Evaluate, Failure, Reply, Request
from fedsplit.federation.parties import NobodyAnswered, Standing
from fedsplit.wire.transport import TrunkLost


def evaluate(client: int) -> Request:
    return Evaluate(BRIEFING, client)


def ask(failures: dict[int, Failure], folder: Path) -> tuple[Any, list[tuple[int, int]]]:
    def play(request: Request) -> Answer:
        return failures.get(request.client) or Reply(request.client)

    parties, _ = gather(play, folder)
    heard: list[tuple[int, int]] = []

    def hear(reply: Reply, standing: Standing) -> None:
        heard.append((reply.client, standing.done))

    parties.ask(range(3), evaluate, hear, "evaluating", 1, Attempt(), None)
    return parties, heard


def test_replies_are_handed_on_and_failures_are_named_and_not_waited_for(tmp_path: Path) -> None:
    parties, heard = ask({1: Failure(1, "ValueError", "ValueError: no luck")}, tmp_path)
    assert heard == [(0, 1), (2, 3)]  # a failure is an answer, too
    assert parties.emit.lines == ["bob failed and is left out: ValueError: no luck"]
    assert parties.trunk.left == [1]


def test_a_client_that_is_absent_is_not_asked_and_counts_as_answered(tmp_path: Path) -> None:
    parties, _ = gather(lambda request: Reply(request.client), tmp_path)
    parties.clients.nodes[1] = ClientNode(2, "bob", absent="ValueError: no luck")  # type: ignore[index]
    assert parties.absent(range(3)) == {1: "ValueError: no luck"}
    heard: list[Standing] = []
    parties.ask(range(3), evaluate, lambda _, standing: heard.append(standing), "evaluating", 1, Attempt(), None)
    assert [request.client for request in parties.clients.asked] == [0, 2]  # type: ignore[attr-defined]
    assert heard == [Standing(2, waiting=(2,)), Standing(3)]
    assert parties.emit.lines == []  # type: ignore[attr-defined]
    with pytest.raises(NobodyAnswered, match="no client answered: all that were asked are left out of the run"):
        parties.ask([1], evaluate, lambda reply, standing: None, "evaluating", 1, Attempt(), None)


def test_where_nobody_answers_the_first_reason_is_told(tmp_path: Path) -> None:
    failures = {client: Failure(client, "ValueError", f"reason {client}") for client in range(3)}
    with pytest.raises(NobodyAnswered, match="no client answered: reason 0"):
        ask(failures, tmp_path)
    parties, _ = gather(lambda request: Reply(request.client), tmp_path)
    with pytest.raises(NobodyAnswered, match="nobody was asked"):
        parties.ask([], evaluate, lambda reply, standing: None, "evaluating", 1, Attempt(), None)


def test_a_trunk_that_is_gone_ends_the_run_at_once(tmp_path: Path) -> None:
    """It is known by the failure's kind, and no other client is asked any more."""
    lost = Failure(0, TRUNK_LOST, "the trunk's process has died")
    parties, _ = gather(lambda request: lost, tmp_path)
    parties.trunk.lose()  # type: ignore[attr-defined]
    with pytest.raises(TrunkLost, match=r"^the trunk's process has died$"):
        parties.ask(range(3), evaluate, lambda reply, standing: None, "evaluating", 1, Attempt(), None)
    assert len(parties.clients.asked) == 1  # type: ignore[attr-defined]


def test_a_client_that_says_the_trunk_is_gone_while_it_is_there_fails_alone(tmp_path: Path) -> None:
    """One client must not have the round of all played again."""
    parties, heard = ask({1: Failure(1, TRUNK_LOST, "the trunk's process has died")}, tmp_path)
    assert heard == [(0, 1), (2, 3)]
    assert parties.emit.lines == ["bob failed and is left out: the trunk's process has died"]


def test_words_for_messages(tmp_path: Path) -> None:
    parties, _ = gather(lambda request: Reply(request.client), tmp_path)
    assert (parties.name(2), parties.sender(2), parties.label(3)) == ("cid", "client 2 (cid)", "round 3/5")
