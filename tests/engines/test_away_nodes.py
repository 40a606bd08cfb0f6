"""Requests to a site that is being started again wait for the site; requests to one that stays away fail."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from uuid import uuid4

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from fedsplit.engines.away_nodes import AwayNodes
from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.stalls import StallWatch
from fedsplit.federation.clients import ClientNode, FederationFailed
from fedsplit.federation.messages import CLIENT_LOST, Answer, Briefing, Evaluate, Failure

BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def to(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train")


def test_a_message_waits_for_its_node_and_holds_up_no_other() -> None:
    clock, there = Clock(), [1]
    away = AwayNodes(10.0, lambda: there, clock)
    first, second = to(1), to(2)
    assert away.take([second, first]) == [first]
    clock.now += 5
    assert away.take([]) == [] and away.count == 1
    there.append(2)
    clock.now += 1
    assert away.take([]) == [second] and away.count == 0


def test_a_node_that_stays_away_is_waited_for_once() -> None:
    """Its message is sent for Flower's error, and later ones at once; after a return, it is waited for again."""
    clock, there = Clock(), list[int]()
    away = AwayNodes(10.0, lambda: there, clock)
    messages = [to(2) for _ in range(4)]
    assert away.take(messages[:1]) == []
    clock.now += 10
    assert away.take([]) == messages[:1]
    assert away.take(messages[1:2]) == messages[1:2]
    there.append(2)
    assert away.take(messages[2:3]) == messages[2:3]
    there.clear()
    assert away.take(messages[3:]) == []
    away.forget()
    assert away.count == 0


def test_nodes_that_never_leave_are_not_looked_for() -> None:
    away = AwayNodes(0.0, lambda: pytest.fail("the nodes were asked for"))
    messages = [to(2)]
    assert away.take(messages) is messages


def test_nodes_are_looked_for_once_a_second_at_most() -> None:
    clock, looks = Clock(), list[float]()

    def there() -> list[int]:
        looks.append(clock.now)
        return []

    away = AwayNodes(100.0, there, clock)
    away.take([to(2)])
    for _ in range(100):
        clock.now += 0.03
        away.take([])
    assert len(looks) == 3


class Restarting:
    """A grid with two nodes, of which one is killed in the middle of its first request, and comes back."""

    def __init__(self, returns: bool) -> None:
        self.returns = returns
        self.looks = 0
        self.pushed: list[int] = []
        self.replies: dict[str, Message] = {}
        self.is_there = True

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        self.is_there = self.is_there or (self.returns and self.looks > 3)
        return [1, 2] if self.is_there else [1]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            is_killed = node == 2 and 2 not in self.pushed
            if is_killed or (node == 2 and not self.is_there):
                self.is_there = False
                self.looks = 0
                reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID  # as Flower 1.41 does
            else:
                reply = Message(RecordDict(), reply_to=message)
            self.pushed.append(node)
            self.replies[ids[-1]] = reply
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        assert ids, "a grid is not asked for nothing"
        return [self.replies.pop(each) for each in list(ids)]


class Refusing(Restarting):
    """A grid that does not take messages: it returns nothing for messages that are too large, None for others."""

    def __init__(self, said: list[str | None]) -> None:
        super().__init__(returns=False)
        self.said = said

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self.said  # type: ignore[return-value]


@pytest.mark.parametrize("said", [[], [None]])
def test_a_message_that_flower_does_not_take_ends_the_run_with_a_reason(said: list[str | None]) -> None:
    """It would count as answered, and the client as neither failed nor asked."""
    stalls = StallWatch(60, lambda: None, lambda: None)
    clients = FlowerClients(Refusing(said), threading.Event(), 2, stalls)  # type: ignore[arg-type]
    clients.know([ClientNode(1, "north")])
    with pytest.raises(FederationFailed, match="too large for the SuperLink"):
        list(clients.ask([Evaluate(BRIEFING, 0)]))


@pytest.mark.parametrize("returns", [True, False])
def test_a_site_that_was_killed_is_asked_again_when_it_is_back(returns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.engines.away_nodes._LOOK_SECONDS", 0.0)
    grid = Restarting(returns)
    stalls = StallWatch(60, lambda: None, lambda: None)
    clients = FlowerClients(grid, threading.Event(), 2, stalls, away_seconds=0.3)  # type: ignore[arg-type]
    clients.know([ClientNode(1, "north"), ClientNode(2, "south")])

    def ask(*numbers: int) -> dict[int, Answer]:
        return {answer.client: answer for answer in clients.ask([Evaluate(BRIEFING, number) for number in numbers])}

    lost = ask(0, 1)[1]
    assert isinstance(lost, Failure) and lost.kind == CLIENT_LOST
    again = ask(1)[1]
    assert isinstance(again, Failure) is not returns
    assert grid.pushed == [1, 2, 2]
