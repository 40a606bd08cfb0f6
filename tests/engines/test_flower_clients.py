"""Requests go out some at a time, answers come in as they arrive, and a failure is one line."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from uuid import uuid4

import pytest
import torch
from flwr.app import Error, Message, RecordDict

from fedsplit.engines import flower_clients
from fedsplit.engines.flower_clients import FOREIGN_DATA, LEAST_UNDER_WAY, UNDER_WAY_EACH, FlowerClients, _reason
from fedsplit.engines.stalls import StallWatch
from fedsplit.federation import introductions, records
from fedsplit.federation.clients import ClientNode, FederationFailed, Interrupted
from fedsplit.federation.messages import TRUNK_LOST, Answer, Briefing, Evaluate, Failure, Introduce, Reply, Request
from fedsplit.updates import Adapters, Layer

BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")
ADAPTERS = Adapters({"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.ones(4, 2)}, {"l": Layer(2.0, True)})

Play = Callable[[Message], Message]
"""Answers a message as a node would."""


def says_nothing(message: Message) -> Message:
    """Answers with an empty message; node 3 always fails as Flower's engine tells it."""
    if message.metadata.dst_node_id == 3:
        return Message(Error(1, "<class 'x.Broken'>:<'no luck'>"), reply_to=message)
    return Message(RecordDict(), reply_to=message)


class Slow:
    """A grid whose nodes answer one at a look, the last that was asked first."""

    def __init__(self, play: Play = says_nothing, nodes: Iterable[int] = ()) -> None:
        self.play = play
        self.nodes = list(nodes)
        self.waiting: list[Message] = []
        self.most = 0

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        new = list(messages)
        for message in new:
            message.metadata.__dict__["_message_id"] = str(uuid4())
        self.waiting += new
        self.most = max(self.most, len(self.waiting))
        return [message.metadata.message_id for message in new]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        assert {message.metadata.message_id for message in self.waiting} == set(ids)
        return [self.play(self.waiting.pop())]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.engines.flower_clients.POLL_SECONDS", 0)


def clients_behind(grid: Slow, workers: int = 2, count: int = 200) -> FlowerClients:
    stalls = StallWatch(60, lambda: None, lambda: None)
    clients = FlowerClients(grid, threading.Event(), workers, stalls)  # type: ignore[arg-type]
    clients.know([ClientNode(node, f"client of {node}") for node in range(count)])
    return clients


def request(client: int) -> Request:
    return Evaluate(BRIEFING, client)


@pytest.mark.parametrize(("workers", "most"), [(2, LEAST_UNDER_WAY), (20, 20 * UNDER_WAY_EACH)])
def test_no_more_than_some_requests_are_made_before_others_are_answered(workers: int, most: int) -> None:
    """One client fails, and its failure is an answer like the others'."""
    grid, made = Slow(), 0

    def requests() -> Iterator[Request]:
        nonlocal made
        for client in range(200):
            made += 1
            yield request(client)

    answers: list[Answer] = []
    for answer in clients_behind(grid, workers).ask(requests()):
        assert made <= len(answers) + most
        answers.append(answer)
    assert grid.most == most
    assert sorted(answer.client for answer in answers) == list(range(200))
    assert [answer for answer in answers if isinstance(answer, Failure)] == [Failure(3, "", "Broken: no luck")]


def test_a_failure_of_our_own_arrives_with_its_kind_and_its_words() -> None:
    """Not as text that somebody would have to search."""
    lost = Failure(1, TRUNK_LOST, "there is no trunk named t")
    grid = Slow(lambda message: Message(records.to_content(lost), reply_to=message))
    assert list(clients_behind(grid).ask([request(1)])) == [lost]


def test_a_stop_is_seen_before_the_next_look() -> None:
    clients = clients_behind(Slow())
    heard = 0
    with pytest.raises(Interrupted):
        for _ in clients.ask(map(request, range(5))):
            heard += 1
            clients._stop.set()
    assert heard == 1


def test_an_answer_is_known_by_its_node_without_a_look_at_every_client() -> None:
    """Or a round of n clients would take n² looks."""

    class Counted(ClientNode):
        looks = 0

        def __getattribute__(self, name: str) -> object:
            if name == "node":
                Counted.looks += 1
            return super().__getattribute__(name)

    clients = clients_behind(Slow())
    held = clients.nodes
    clients.know([Counted(1000 - client, f"client {client}") for client in range(50)])
    looks = Counted.looks
    answers = [answer.client for answer in clients.ask(map(request, range(50)))]
    assert sorted(answers) == list(range(50))
    assert Counted.looks == looks + 50  # one for each request: the node that it goes to
    assert held is clients.nodes and held[7].name == "client 7"


def test_an_answer_from_a_node_at_which_no_client_is_ends_the_run() -> None:
    def elsewhere(message: Message) -> Message:
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 999
        return reply

    with pytest.raises(FederationFailed, match="a reply came from node 999, at which no client is"):
        list(clients_behind(Slow(elsewhere)).ask([request(0)]))


def introduces(numbers: dict[int, int]) -> Play:
    """Has each node introduce itself as the client of a number; a node without one fails."""

    def play(message: Message) -> Message:
        node = message.metadata.dst_node_id
        asked = records.to_request(message, client=0)
        assert isinstance(asked, Introduce) and asked.briefing == BRIEFING
        if node not in numbers:
            return Message(Error(1, "<class 'x.Broken'>:<'no luck'>"), reply_to=message)
        start = {"bottom": ADAPTERS, "top": ADAPTERS} if numbers[node] == 0 else {}
        introduced = introductions.Introduction(numbers[node], f"owner {numbers[node]}", {}, start)
        return Message(records.to_content(introductions.introduce(introduced)), reply_to=message)

    return play


def test_clients_are_numbered_by_what_they_say_and_not_by_their_nodes() -> None:
    clients = clients_behind(Slow(introduces({50: 2, 60: 0, 70: 1}), [50, 60, 70]), count=0)
    met = list(clients.meet(BRIEFING, 3))
    assert [one.client for one in met] == [1, 0, 2]  # as they arrive
    assert [one.client for one in met if one.start] == [0]
    assert clients.nodes == [ClientNode(60, "owner 0"), ClientNode(70, "owner 1"), ClientNode(50, "owner 2")]


@pytest.mark.parametrize(
    ("numbers", "absent"),
    [
        ({}, dict.fromkeys(range(3), "Broken: no luck")),
        ({50: 0, 60: 2}, {1: "Broken: no luck"}),
        ({50: 0, 60: 1, 70: 1}, dict.fromkeys((1, 2), "two nodes say that they are client 1")),
    ],
    ids=str,
)
def test_who_cannot_introduce_itself_is_absent(numbers: dict[int, int], absent: dict[int, str]) -> None:
    clients = clients_behind(Slow(introduces(numbers), [50, 60, 70]), count=0)
    list(clients.meet(BRIEFING, 3))
    assert {client: node.absent for client, node in enumerate(clients.nodes) if node.absent} == absent
    assert {node.node for node in clients.nodes} == {50, 60, 70}


@pytest.mark.parametrize(("times", "absent"), [(2, ""), (3, "ActorDiedError: gone")])
def test_a_process_that_is_lost_as_it_introduces_itself_is_asked_again_twice(times: int, absent: str) -> None:
    plays = introduces({50: 0, 60: 1, 70: 2})
    deaths = itertools.count(1)

    def dies(message: Message) -> Message:
        if message.metadata.dst_node_id == 60 and next(deaths) <= times:
            reason = "<class 'ray.exceptions.ActorDiedError'>:<'gone'>"
            return Message(Error(1, reason), reply_to=message)
        return plays(message)

    clients = clients_behind(Slow(dies, [50, 60, 70]), count=0)
    list(clients.meet(BRIEFING, 3))
    assert [node.absent for node in clients.nodes] == ["", absent, ""]


def test_a_stop_ends_the_wait_for_nodes() -> None:
    clients = clients_behind(Slow(nodes=[50]), count=0)
    clients._stop.set()
    with pytest.raises(Interrupted):
        list(clients.meet(BRIEFING, 3))


def test_what_a_client_says_reaches_the_server_by_its_node_and_not_by_its_claim() -> None:
    def claims(message: Message) -> Message:
        reply = Reply(client=0, metrics={"client": 0, "loss": 1.0}, about=json.dumps({}))
        return Message(records.to_content(reply), reply_to=message)

    (answer,) = clients_behind(Slow(claims)).ask([request(2)])
    assert isinstance(answer, Reply) and answer.client == 2 and answer.metrics["client"] == 0


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
        ("", "no reason was given"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(reason: str, line: str) -> None:
    assert _reason(Failure(0, "", reason)) == line
    assert _reason(Failure(0, "Diverged", reason)) == reason


@pytest.mark.parametrize("words", [flower_clients._RESTARTING, flower_clients._LOST_PROCESS])
def test_words_of_the_engine_in_a_clients_own_failure_are_not_believed(words: str) -> None:
    """The request is neither sent again, nor is the process taken for lost."""
    grid = Slow(lambda message: Message(records.to_content(Failure(1, "", words)), reply_to=message))
    assert list(clients_behind(grid).ask([request(1)])) == [Failure(1, "Failed", words)]


def test_other_data_than_the_drivers_end_the_run() -> None:
    failure = Failure(1, FOREIGN_DATA, "on node-2, the data of client 1 are not those of the driver")
    grid = Slow(lambda message: Message(records.to_content(failure), reply_to=message))
    with pytest.raises(FederationFailed, match="on node-2, the data of client 1"):
        list(clients_behind(grid).ask([request(1)]))


def test_files_that_crossed_are_told_once() -> None:
    crossed = [(0, 0)]
    stalls = StallWatch(60, lambda: None, lambda: None)
    clients = FlowerClients(Slow(), threading.Event(), 1, stalls, shipped=lambda: crossed[0])  # type: ignore[arg-type]
    assert not any(clients.take_shipped().values())
    crossed[0] = (10, 3)
    assert clients.take_shipped() == {"client_files_down": 10, "client_files_up": 3}
    crossed[0] = (10, 5)
    assert clients.take_shipped() == {"client_files_down": 0, "client_files_up": 2}
