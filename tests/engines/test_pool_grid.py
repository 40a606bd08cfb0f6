"""Flower's grid over a pool: which node is asked, which reply belongs to which message, and what a mod keeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedsplit.engines.client_files import Shipping
from fedsplit.engines.pool_grid import Played, PoolGrid
from fedsplit.engines.worker_pool import NoWorkers, Place, Work, WorkerLost
from fedsplit.federation import records
from fedsplit.federation.messages import CLIENT_LOST, Failure

HERE = Place("here", 1)

Play = Callable[[Message, Context], Any]


class Pool:
    """Does each piece of work at once, or when it is told to."""

    def __init__(self, play: Play, holds: bool = False) -> None:
        self._play = play
        self._holds = holds
        self.held: list[Work] = []

    def submit(self, work: Work) -> None:
        self.held.append(work)
        if not self._holds:
            self.go_on()

    def go_on(self) -> None:
        """Does the work that was given last."""
        work = self.held.pop()
        message, context, _, _ = work.arguments(HERE)
        played = self._play(message, context)
        work.done(HERE, played if isinstance(played, Exception) else Played(*played))

    def grow(self) -> None:
        """There is room for as many as are asked."""


def grid_over(play: Play, clients: int = 5, holds: bool = False) -> tuple[PoolGrid, Pool]:
    pool = Pool(play, holds)
    grid: Any = PoolGrid(pool, clients)  # type: ignore[arg-type]
    return grid, pool


def to(node: int) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"said": node})}), node, MessageType.TRAIN)


def says_its_partition(message: Message, context: Context) -> tuple[Message, RecordDict]:
    config = ConfigRecord({"partition": context.node_config["partition-id"]})
    return Message(RecordDict({"config": config}), reply_to=message), context.state


def partition(reply: Message) -> object:
    return reply.content.config_records["config"]["partition"]


def test_every_client_has_a_node_and_is_its_partition() -> None:
    grid, _ = grid_over(says_its_partition)
    nodes = grid.get_node_ids()
    replies = grid.send_and_receive([to(node) for node in nodes])
    assert {reply.metadata.src_node_id: partition(reply) for reply in replies} == {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}


def test_a_reply_is_pulled_once_and_by_its_message() -> None:
    grid, pool = grid_over(says_its_partition, holds=True)
    first, second = grid.push_messages([to(1), to(2)])
    assert grid.pull_messages([first, second]) == []
    pool.go_on()
    assert grid.pull_messages([first]) == []
    (reply,) = grid.pull_messages([first, second])
    assert (reply.metadata.reply_to_message_id, partition(reply)) == (second, 1)
    assert grid.pull_messages([second]) == []


def test_a_wait_ends_with_a_reply_or_with_its_time() -> None:
    grid, pool = grid_over(says_its_partition, holds=True)
    grid.push_messages([to(1)])
    grid.wait(0.01)
    timer = threading.Timer(0.05, pool.go_on)
    timer.start()
    began = time.monotonic()
    grid.wait(60)
    assert time.monotonic() - began < 30


def test_who_has_not_answered_in_time_is_not_waited_for() -> None:
    grid, pool = grid_over(says_its_partition, holds=True)
    assert grid.send_and_receive([to(1)], timeout=0.01) == []
    assert len(pool.held) == 1


def test_what_a_mod_keeps_in_the_context_is_there_the_next_time_and_at_no_other_node() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = context.state.config_records.get("seen", ConfigRecord({"times": 0}))
        times = int(str(seen["times"])) + 1
        context.state["seen"] = ConfigRecord({"times": times})
        return Message(RecordDict({"config": ConfigRecord({"times": times})}), reply_to=message)

    grid, _ = grid_over(lambda message, context: (app(message, context), context.state))
    told = []
    for node in (1, 1, 2, 1):
        (reply,) = grid.send_and_receive([to(node)])
        told.append(reply.content.config_records["config"]["times"])
    assert told == [1, 2, 1, 3]


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (WorkerLost("the process is gone"), ErrorCode.NODE_UNAVAILABLE, CLIENT_LOST),
        (NoWorkers("they all die"), ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ""),
    ],
)
def test_a_lost_process_is_told_from_a_client_that_failed(error: Exception, code: int, kind: str) -> None:
    grid, _ = grid_over(lambda *_: error)
    (reply,) = grid.send_and_receive([to(2)])
    assert reply.error.code == code
    assert records.to_answer(reply, 1) == Failure(1, kind, str(error))


def test_the_facts_of_the_run_are_those_that_were_set() -> None:
    grid, _ = grid_over(says_its_partition)
    assert grid.run.run_id == 1
    grid.set_run(grid.run.create_empty(7))
    assert grid.run.run_id == 7
    made = grid.create_message(RecordDict(), MessageType.QUERY, 3, "group")
    assert (made.metadata.dst_node_id, made.metadata.group_id) == (3, "group")


def test_a_client_prefers_the_node_that_has_its_files(tmp_path: Path) -> None:
    """A node that would need them sent again waits for a moment, as other work may suit it."""
    pool = Pool(says_its_partition, holds=True)
    grid: Any = PoolGrid(pool, 3, Shipping(tmp_path), home="here")  # type: ignore[arg-type]
    there, elsewhere = Place("there", 2), Place("elsewhere", 3)
    grid.push_messages([to(2)])
    (work,) = pool.held
    assert work.suits(there) and work.suits(elsewhere)
    pool.held.clear()
    message, context, *_ = work.arguments(there)
    work.done(there, Played(*says_its_partition(message, context)))
    grid.push_messages([to(2)])
    (again,) = pool.held
    assert again.suits(there) and again.suits(HERE) and not again.suits(elsewhere)
