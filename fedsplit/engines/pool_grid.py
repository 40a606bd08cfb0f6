"""Flower's `Grid` over a pool of workers: messages to nodes, each the place of one client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsplit.durable import NotWritten
from fedsplit.engines.client_data import ForeignData
from fedsplit.engines.client_files import Carrier, Luggage, MissingFiles, Parcel
from fedsplit.engines.flower_clients import FOREIGN_DATA
from fedsplit.engines.worker_pool import Place, WorkerLost, WorkerPool
from fedsplit.federation import records
from fedsplit.federation.messages import Failure

RUN_ID = 1
"""Id of the only run of a grid."""

STORE = "store"
"""Setting of our messages with the folder of the clients' disks."""

_MOST_SENT = 3
"""How often a message is sent whose client's files are not on the node any more when it comes."""


@dataclass(frozen=True)
class Played:
    """Result of a message to a worker.

    Attributes:
        reply: Reply of the client.
        state: State of the node's context.
        changes: Files that the client has changed on a node other than the driver's.
    """

    reply: Message
    state: RecordDict
    changes: Parcel = field(default_factory=Parcel)


@dataclass(frozen=True)
class Lacking:
    """Answer of a worker whose node lacks files that the driver sent before."""


def load_client() -> Callable[[Message, Context, Luggage | None], Played | Lacking]:
    """Loads our ClientApp; called in a worker."""
    from fedsplit.engines.client_app import app

    def play(message: Message, context: Context, luggage: Luggage | None) -> Played | Lacking:
        if luggage is None:
            with records.named_run():
                return Played(app(message, context), context.state)
        client = int(context.node_config["partition-id"])
        settings = message.content.config_records[records.CONFIG]
        try:
            settings[STORE] = str(luggage.arrive(Path(str(settings[STORE])), client))
        except MissingFiles:
            # No error: the driver only knows too much about this node, and sends all files again.
            return Lacking()
        except ForeignData as error:
            failure = Failure(client, FOREIGN_DATA, str(error))
            return Played(Message(records.to_content(failure), reply_to=message), context.state)
        with records.named_run():
            reply = app(message, context)
        return Played(reply, context.state, luggage.leave())

    return play


@dataclass(frozen=True, eq=False)
class _Delivery:
    """A message on its way to a client, and the reply on its way back.

    Attributes:
        message: The message.
        context: Context of the node.
        carrier: Brings the client's files to the worker; None on a single machine.
        wanted: Ray's id of the preferred node for the client; empty without a preference.
        arrived: Called with the message, the place, and the reply or the error.
        again: Sends the message once more.
        tries: Number of earlier sends.
    """

    message: Message
    context: Context
    carrier: Carrier | None
    wanted: str
    arrived: Callable[[Message, Place, Played | Exception], None]
    again: Callable[[_Delivery], None]
    tries: int = 0

    @property
    def client(self) -> int:
        """Number of the client."""
        return int(self.context.node_config["partition-id"])

    @property
    def home(self) -> str:
        """Ray's id of the only node that may play the client; empty if all may."""
        return "" if self.carrier is None else self.carrier.home.get(self.client, "")

    @property
    def can_be_early(self) -> bool:
        """Returns True if the client needs no files: which of them a place lacks is known only after other work."""
        return self.carrier is None

    def suits(self, place: Place) -> bool:
        """Returns True if a client belongs to the node, which has the client's files or will get them."""
        return self.wanted in ("", place.node)

    def arguments(self, place: Place) -> tuple[Message, Context, Luggage | None]:
        """Returns the message with what the client needs at the place."""
        luggage = None if self.carrier is None else self.carrier.pack(place, self.client)
        return self.message, self.context, luggage

    def done(self, place: Place, result: Played | Lacking | Exception) -> None:
        """Takes the reply, and the files that the client has changed."""
        if isinstance(result, Lacking):
            assert self.carrier is not None
            self.carrier.forget(place)
            if self.tries < _MOST_SENT - 1:
                self.again(replace(self, tries=self.tries + 1))
                return
            result = MissingFiles(f"files of client {self.client} did not stay on the node, {_MOST_SENT} times")
        elif self.carrier is not None:
            if isinstance(result, Played):
                try:
                    self.carrier.unpack(place, self.client, result.changes)
                except (ValueError, NotWritten) as error:
                    result = error
            else:
                # After an error, nobody knows which files were written before it.
                self.carrier.forget(place)
        self.arrived(self.message, place, result)


class PoolGrid(Grid):
    """A grid whose nodes are played by the workers of a pool.

    Node `n` has the client `n - 1`. What mods keep in the context of a node is kept here between two messages.
    """

    def __init__(self, pool: WorkerPool, clients: int, carrier: Carrier | None = None) -> None:
        """Knows the nodes from the beginning.

        Args:
            pool: Plays the clients.
            clients: Number of clients.
            carrier: Brings clients' files to the nodes of a cluster; None on a single machine.
        """
        self._pool = pool
        self._carrier = carrier
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

    def shipped(self) -> tuple[int, int]:
        """Returns the bytes of clients' files sent to nodes so far, and the bytes received from nodes."""
        return (0, 0) if self._carrier is None else (self._carrier.sent, self._carrier.received)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Returns the ids of all nodes."""
        return list(range(1, self._clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages in order.

        Returns:
            Ids of the messages, for pulling the replies.
        """
        self._pool.grow()  # nodes may have joined since the last messages
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        identifier = str(uuid4())
        # Flower's own grids set the id so; there is no public way.
        message.metadata.__dict__["_message_id"] = identifier
        facts = {"partition-id": node - 1, "num-partitions": self._clients}
        state = self._states.get(node, RecordDict())
        context = Context(RUN_ID, node, dict(facts), state, run_config={})
        # The place of the last message has the client's files. Before the first message, the plan says where.
        wanted = self._last.get(node, "") or self._planned(node - 1)
        delivery = _Delivery(message, context, self._carrier, wanted, self._take, self._pool.submit)
        self._pool.submit(delivery)
        return identifier

    def _planned(self, client: int) -> str:
        """Returns Ray's id of the node for a client's first request. A restarted run chooses the same node."""
        if self._carrier is not None and client in self._carrier.home:
            return self._carrier.home[client]
        places = self._pool.places()
        return places[client % len(places)].node if places else ""

    def _take(self, message: Message, place: Place, result: Played | Exception) -> None:
        """Takes the result of a worker; called in a thread of the pool."""
        if place.node:  # none where the work was never begun
            self._last[message.metadata.dst_node_id] = place.node
        if isinstance(result, Exception):
            is_lost = isinstance(result, WorkerLost)
            code = ErrorCode.NODE_UNAVAILABLE if is_lost else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code, str(result)), reply_to=message)
            state = None  # a call that failed leaves the node's context as it was
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

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
    ) -> list[Message]:
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
