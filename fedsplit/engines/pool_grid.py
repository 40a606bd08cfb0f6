"""Flower's `Grid` over a pool of workers: messages to nodes, each the place of one client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsplit.durable import NotWritten
from fedsplit.engines.client_files import NodeDisk, Parcel, Shipping, stamps
from fedsplit.engines.worker_pool import Place, WorkerLost, WorkerPool
from fedsplit.federation import records

RUN_ID = 1
"""Id of the only run of a grid."""

STORE = "store"
"""Setting of our messages with the folder of the clients' disks."""


@dataclass(frozen=True)
class Played:
    """What a worker returns.

    Attributes:
        reply: Reply of the client.
        state: State of the node's context.
        changes: Files that the client has changed, where it was played on another node.
    """

    reply: Message
    state: RecordDict
    changes: Parcel = field(default_factory=Parcel)


def load_client() -> Callable[[Message, Context, NodeDisk | None, Parcel], Played]:
    """Loads our ClientApp; called in a worker."""
    from fedsplit.engines.client_app import app

    def play(message: Message, context: Context, disk: NodeDisk | None, parcel: Parcel) -> Played:
        if disk is None:
            with records.named_run():
                return Played(app(message, context), context.state)
        client = int(context.node_config["partition-id"])
        disk.receive(parcel)
        message.content.config_records[records.CONFIG][STORE] = str(disk.root)
        before = stamps(disk.root, client)
        with records.named_run():
            reply = app(message, context)
        return Played(reply, context.state, disk.changes(before, client))

    return play


@dataclass(frozen=True, eq=False)
class _Delivery:
    """A message on its way to a client, and the reply on its way back.

    Attributes:
        message: The message.
        context: Context of the node.
        shipping: Brings files to other nodes; None where all nodes see the clients' disks.
        home: Id of the node on which the clients' disks are.
        last: Id of the node that has played the client last; empty if none has.
        arrived: Takes the message, the place and the reply, or the error.
    """

    message: Message
    context: Context
    shipping: Shipping | None
    home: str
    last: str
    arrived: Callable[[Message, Place, Played | Exception], None]

    @property
    def client(self) -> int:
        """Number of the client."""
        return int(self.context.node_config["partition-id"])

    def _ships_to(self, place: Place) -> bool:
        return self.shipping is not None and place.node not in ("", self.home)

    def suits(self, place: Place) -> bool:
        """Returns whether the client's files are at the place already, or would have to travel in any case."""
        return not self._ships_to(place) or self.last in ("", place.node)

    def arguments(self, place: Place) -> tuple[Message, Context, NodeDisk | None, Parcel]:
        """Returns the message with the files that the place lacks."""
        if self.shipping is None or not self._ships_to(place):
            return self.message, self.context, None, Parcel()
        return self.message, self.context, self.shipping.disk, self.shipping.to_node(place, self.client)

    def done(self, place: Place, result: Played | Exception) -> None:
        """Takes the reply, and the files that the client has changed."""
        if self.shipping is not None and self._ships_to(place):
            if isinstance(result, Played):
                try:
                    self.shipping.from_node(place, self.client, result.changes)
                except (ValueError, NotWritten) as error:
                    result = error
            else:
                self.shipping.forget(place)
        self.arrived(self.message, place, result)


class PoolGrid(Grid):
    """A grid whose nodes are played by the workers of a pool.

    Node `n` has the client `n - 1`. What mods keep in the context of a node is kept here between two messages.
    """

    def __init__(self, pool: WorkerPool, clients: int, shipping: Shipping | None = None, home: str = "") -> None:
        """Knows the nodes from the beginning.

        Args:
            pool: Plays the clients.
            clients: Number of clients.
            shipping: Brings files to other nodes of a cluster; None where all nodes see the clients' disks.
            home: Ray's id of the node on which the clients' disks are.
        """
        self._pool = pool
        self._shipping = shipping
        self._home = home
        self._clients = clients
        self._run = Run.create_empty(RUN_ID)
        self._states: dict[int, RecordDict] = {}  # by node; of those that keep anything
        self._last: dict[int, str] = {}  # where each client was played last
        self._replies: dict[str, Message] = {}  # by the id of the message that they answer
        self._arrived = threading.Condition()

    def set_run(self, run: Run) -> None:
        """Sets the facts of the run that `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """Facts of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Returns the ids of all nodes."""
        return list(range(1, self._clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages, in their order.

        Returns:
            Ids by which the replies are pulled.
        """
        self._pool.grow()
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        identifier = str(uuid4())
        # Flower's own grids set the id so; there is no public way.
        message.metadata.__dict__["_message_id"] = identifier
        facts = {"partition-id": node - 1, "num-partitions": self._clients}
        context = Context(RUN_ID, node, dict(facts), self._states.get(node, RecordDict()), run_config={})
        last = self._last.get(node, "")
        self._pool.submit(_Delivery(message, context, self._shipping, self._home, last, self._take))
        return identifier

    def _take(self, message: Message, place: Place, result: Played | Exception) -> None:
        """Takes the result of a worker; called in a thread of the pool."""
        self._last[message.metadata.dst_node_id] = place.node
        if isinstance(result, Exception):
            is_lost = isinstance(result, WorkerLost)
            code = ErrorCode.NODE_UNAVAILABLE if is_lost else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code, str(result)), reply_to=message)
            state = None
        else:
            reply, state = result.reply, result.state
        with self._arrived:
            if state:
                self._states[message.metadata.dst_node_id] = state
            self._replies[message.metadata.message_id] = reply
            self._arrived.notify_all()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies that have arrived to some messages, each once."""
        with self._arrived:
            there = [identifier for identifier in message_ids if identifier in self._replies]
            return [self._replies.pop(identifier) for identifier in there]

    def wait(self, seconds: float) -> None:
        """Waits until there is a reply to be pulled, or a time has passed."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._replies, seconds)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Sends messages, and returns the replies that arrive in time."""
        waiting = set(self.push_messages(messages))
        until = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            left = 1.0 if until is None else until - time.monotonic()
            if left <= 0:
                break
            self.wait(left)
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies
