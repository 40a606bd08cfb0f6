"""Replies come in, failures are told in a line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from uuid import uuid4

import pytest
from experiments.in_process import Silent, name_run
from fedsplit.federation.exchange import LEAST_UNDER_WAY, UNDER_WAY_EACH, Exchange, Interrupted, _reason
from fedsplit.federation.stalls import StallWatch
from flwr.app import Error, Message, RecordDict

from fedsplit.federation.aggregation import FederationFailed, Member


class Slow:
    """A grid whose nodes answer one at a look, the last that was asked first; node 3 always fails."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []
        self.most = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        new = list(messages)
        for message in new:
            message.metadata.__dict__["_message_id"] = str(uuid4())
        self.waiting += new
        self.most = max(self.most, len(self.waiting))
        return [message.metadata.message_id for message in new]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        assert {message.metadata.message_id for message in self.waiting} == set(ids)
        asked = self.waiting.pop()
        if asked.metadata.dst_node_id == 3:
            return [Message(Error(1, "<class 'x.Broken'>:<'no luck'>"), reply_to=asked)]
        return [Message(RecordDict(), reply_to=asked)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.federation.exchange.POLL_SECONDS", 0)
    name_run()


def _exchange(workers: int = 2, lost: Callable[[int], None] = lambda client: None) -> Exchange:
    stalls = StallWatch(60, lambda: None, lambda: None)
    exchange = Exchange(threading.Event(), Silent(), lost, workers, stalls)
    exchange.know([Member(node, f"client of {node}") for node in range(200)])
    return exchange


def _message(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train")


@pytest.mark.parametrize(("workers", "most"), [(2, LEAST_UNDER_WAY), (20, 20 * UNDER_WAY_EACH)])
def test_no_more_than_some_messages_are_made_before_others_are_answered(workers: int, most: int) -> None:
    grid, heard, made, lost = Slow(), [], 0, []

    def messages() -> Iterator[Message]:
        nonlocal made
        for node in range(200):
            made += 1
            yield _message(node)

    def hear(reply: Message, done: int, of: int) -> None:
        heard.append((done, of))
        assert made <= done + most

    replies = _exchange(workers, lost.append).send(grid, messages(), 200, hear)  # type: ignore[arg-type]
    assert grid.most == most
    assert sorted(reply.metadata.src_node_id for reply in replies) == [node for node in range(200) if node != 3]
    assert len(heard) == 199 and max(heard) == (200, 200)
    assert lost == [3]


def test_where_nobody_answers_the_reason_is_told() -> None:
    with pytest.raises(FederationFailed, match="no client answered: Broken: no luck"):
        _exchange().send(Slow(), [_message(3)], 1, lambda *_: None)  # type: ignore[arg-type]


def test_a_stop_is_seen_before_the_next_look() -> None:
    exchange = _exchange()

    def stop(reply: Message, done: int, of: int) -> None:
        exchange._stop.set()

    with pytest.raises(Interrupted):
        exchange.send(Slow(), map(_message, range(5)), 5, stop)  # type: ignore[arg-type]


def test_a_reply_is_known_by_its_node_without_a_look_at_every_client() -> None:
    """Or a round of n clients would take n² looks."""

    class Counted(Member):
        looks = 0

        def __getattribute__(self, name: str) -> object:
            if name == "node":
                Counted.looks += 1
            return super().__getattribute__(name)

    exchange = _exchange()
    held = exchange.members
    exchange.know([Counted(1000 - client, f"client {client}") for client in range(50)])
    looks = Counted.looks
    assert [exchange.client_at(1000 - client) for client in range(50)] == list(range(50))
    assert exchange.client_at(3) is None
    assert Counted.looks == looks
    assert held is exchange.members and held[7].name == "client 7"


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("<class 'ray.exceptions.ActorError'>:<'It is gone.'>", "ActorError: It is gone."),
        ("<class 'ray.TaskError'>:<'Traceback:\n  File x\nValueError: no luck\n'>", "ValueError: no luck"),
        (
            "<class 'ray.RayTaskError(X)'>:<'a\nb.ClientAppException: ClientAppException occurred. Message: no luck'>",
            "no luck",
        ),
        ("ValueError: no luck", "ValueError: no luck"),
        (None, "no reason was given"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(reason: str | None, line: str) -> None:
    assert _reason(reason) == line
