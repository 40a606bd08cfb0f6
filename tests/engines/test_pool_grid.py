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

from fedsplit.engines.client_data import Digests, SharedFolder
from fedsplit.engines.client_files import NodeDisk, Shipping
from fedsplit.engines.flower_clients import FOREIGN_DATA
from fedsplit.engines.pool_grid import Lacking, Played, PoolGrid, load_client
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
        message, context, _ = work.arguments(HERE)
        played = self._play(message, context)
        work.done(HERE, played if isinstance(played, Exception) else Played(*played))

    def grow(self) -> None:
        """There is room for as many as are asked."""

    def places(self) -> list[Place]:
        """Two processes on one node, and one on another."""
        return [HERE, Place("here", 2), Place("there", 3)]


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


def suiting(work: Work) -> list[str]:
    return [node for node in ("here", "there", "elsewhere") if work.suits(Place(node, 9))]


def test_clients_are_planned_by_number_and_the_same_after_a_restart() -> None:
    """Work goes to the node that is planned for it, as long as the node has processes that wait for work."""
    pool = Pool(says_its_partition, holds=True)
    for _ in range(2):
        grid: Any = PoolGrid(pool, 6)  # type: ignore[arg-type]
        grid.push_messages([to(node) for node in range(1, 7)])
        assert [suiting(work) for work in pool.held] == [["here"], ["here"], ["there"]] * 2
        pool.held.clear()


def test_a_client_prefers_the_node_that_has_played_it(tmp_path: Path) -> None:
    """Another node would need its files sent again."""
    pool = Pool(says_its_partition, holds=True)
    grid: Any = PoolGrid(pool, 3, Shipping(tmp_path, driver="here"))  # type: ignore[arg-type]
    grid.push_messages([to(1)])
    (work,) = pool.held
    pool.held.clear()
    elsewhere = Place("elsewhere", 3)
    message, context, _ = work.arguments(elsewhere)
    work.done(elsewhere, Played(*says_its_partition(message, context)))
    grid.push_messages([to(1)])
    assert suiting(pool.held[0]) == ["elsewhere"]


def test_files_that_are_gone_from_a_node_are_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's only process has died, and a sibling is given a client before the driver hears of the death."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "clients" / "data").mkdir(parents=True)
    (tmp_path / "clients" / "data" / "0000.safetensors").write_bytes(b"text")
    disk = NodeDisk("run")
    pool = Pool(says_its_partition, holds=True)
    shipping = Shipping(tmp_path / "clients", "driver", disk)
    grid: Any = PoolGrid(pool, 1, shipping)  # type: ignore[arg-type]
    there, sibling = Place("there", 1), Place("there", 2)

    def play(place: Place) -> None:
        """Plays the client as `load_client` has it played, by an app that reads the client's data."""
        work = pool.held.pop()
        message, context, luggage = work.arguments(place)
        message.content.config_records["config"]["store"] = "as the driver names it"
        work.done(place, load_client()(message, context, luggage))

    monkeypatch.setattr("fedsplit.engines.client_app.app", reads_its_data)
    grid.push_messages([to(1)])
    play(there)
    (disk.root / "data" / "0000.safetensors").unlink()
    (identifier,) = grid.push_messages([to(1)])
    play(sibling)
    assert grid.pull_messages([identifier]) == [], "the message is sent again, with the files"
    play(sibling)
    (reply,) = grid.pull_messages([identifier])
    assert reply.content.config_records["config"]["data"] == "text"
    assert grid.shipped() == (8, 0)


def reads_its_data(message: Message, context: Context) -> Message:
    root = Path(str(message.content.config_records["config"]["store"]))
    config = ConfigRecord({"data": (root / "data" / "0000.safetensors").read_text()})
    return Message(RecordDict({"config": config}), reply_to=message)


def test_files_that_never_stay_on_a_node_end_the_attempts() -> None:
    pool = Pool(says_its_partition, holds=True)
    grid: Any = PoolGrid(pool, 1, Shipping(Path("nowhere"), "driver"))  # type: ignore[arg-type]
    (identifier,) = grid.push_messages([to(1)])
    for _ in range(3):
        assert grid.pull_messages([identifier]) == []
        pool.held.pop().done(Place("there", 1), Lacking())
    (reply,) = grid.pull_messages([identifier])
    assert reply.error.reason == "files of client 0 did not stay on the node, 3 times"


def test_a_client_with_a_home_is_played_there_alone(tmp_path: Path) -> None:
    pool = Pool(says_its_partition, holds=True)
    carrier = SharedFolder(tmp_path)
    carrier.home = {1: "there"}
    grid: Any = PoolGrid(pool, 2, carrier)  # type: ignore[arg-type]
    grid.push_messages([to(1), to(2)])
    assert [work.home for work in pool.held] == ["", "there"]
    assert suiting(pool.held[1]) == ["there"]


def test_a_node_that_sees_other_data_fails_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "driver" / "data").mkdir(parents=True)
    (tmp_path / "driver" / "data" / "0000.safetensors").write_bytes(b"text")
    pool = Pool(says_its_partition, holds=True)
    carrier = SharedFolder(tmp_path / "driver")
    assert len(Digests(tmp_path / "driver")[0]) == 64
    grid: Any = PoolGrid(pool, 1, carrier)  # type: ignore[arg-type]
    (identifier,) = grid.push_messages([to(1)])
    message, context, luggage = pool.held[0].arguments(HERE)
    message.content.config_records["config"]["store"] = str(tmp_path / "elsewhere")
    pool.held[0].done(HERE, load_client()(message, context, luggage))
    (reply,) = grid.pull_messages([identifier])
    failure = records.to_answer(reply, 0)
    assert isinstance(failure, Failure) and failure.kind == FOREIGN_DATA
    assert failure.reason.startswith("data.at: ") and "shared needs one folder of --out" in failure.reason
