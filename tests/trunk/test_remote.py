"""A run at a trunk elsewhere: a connection for each client, and one kind of error for a trunk that is lost."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.settings.documents import build
from fedsplit.trunk import port
from fedsplit.trunk.control_bytes import message_from_bytes, reply_as_bytes
from fedsplit.trunk.remote import RemoteTrunk, begin_run, finish_run
from fedsplit.trunk.run_terms import BeginRun, Begun, FinishRun, Terms
from fedsplit.wire.grpc_calls import RefusedByServer
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import ForeignStep, StaleStep
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import TrunkLost, Unanswered


class Line:
    """A connection that answers packets by themselves, and replies to messages."""

    def __init__(self, client: int | None) -> None:
        self.client = client
        self.asked: list[Any] = []
        self.sent: list[Packet] = []
        self.forgets = 0
        self.is_closed = False
        self.reply: Any = None
        self.error: Exception | None = None

    def send(self, packet: Packet) -> Any:
        self.sent.append(packet)

        def wait() -> Packet:
            if self.error is not None:
                raise self.error
            return packet

        return wait

    def forget(self) -> None:
        self.forgets += 1

    def control(self, request: bytes) -> bytes:
        if self.error is not None:
            raise self.error
        self.asked.append(message_from_bytes(request))
        return reply_as_bytes(type(self.asked[-1][0]), self.reply)

    def close(self) -> None:
        self.is_closed = True


class Exchange:
    """Makes connections, and remembers them."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.reply: Any = None
        self.error: Exception | None = None

    def __call__(self, client: int | None) -> Line:
        line = Line(client)
        line.reply, line.error = self.reply, self.error
        self.lines.append(line)
        return line


def packet(client: int) -> Packet:
    return Packet(StepKey(round=1, client=client, step=0))


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


def test_every_client_has_a_connection_of_its_own_and_the_federation_another(exchange: Exchange) -> None:
    trunk = RemoteTrunk("trunk-1", exchange, is_operator=True)
    for client in (0, 1, 0):
        assert trunk.send(packet(client))() == packet(client)
    trunk.begin([0, 1])
    trunk.commit()
    assert [line.client for line in exchange.lines] == [0, 1, None]
    assert [len(line.sent) for line in exchange.lines] == [2, 1, 0]
    assert exchange.lines[2].asked == [(port.BeginGroup((0, 1)), "trunk-1"), (port.Commit(), "trunk-1")]


def test_the_connection_unused_for_longest_is_closed(exchange: Exchange) -> None:
    trunk = RemoteTrunk("t", exchange, is_operator=False, most_lines=2)
    for client in (0, 1, 0, 2, 1):
        trunk.send(packet(client))()
    assert [(line.client, line.is_closed) for line in exchange.lines] == [
        (0, True),
        (1, True),
        (2, False),
        (1, False),
    ]
    trunk.kill()
    assert all(line.is_closed for line in exchange.lines)


def test_a_client_that_leaves_tells_nobody_and_drops_its_answers(exchange: Exchange) -> None:
    """A certificate of a client controls no run; the federation ends the client's round."""
    trunk = RemoteTrunk("t", exchange, is_operator=False)
    trunk.send(packet(3))
    trunk.leave(3)
    trunk.leave(4)
    (line,) = exchange.lines
    assert (line.forgets, line.asked) == (1, [])
    with pytest.raises(TypeError, match="a client cannot send Commit"):
        trunk.commit()


def test_the_federation_tells_the_trunk_who_leaves(exchange: Exchange) -> None:
    trunk = RemoteTrunk("t", exchange, is_operator=True)
    trunk.leave(3)
    assert exchange.lines[0].asked == [(port.Leave(3), "t")]


@pytest.mark.parametrize(
    "error",
    [ForeignStep("another run"), NotTrusted("another token"), RefusedByServer("ABORTED", "restart"), Unanswered("cut")],
    ids=lambda error: type(error).__name__,
)
def test_a_trunk_that_does_not_serve_the_run_is_lost(error: Exception, exchange: Exchange) -> None:
    exchange.error = error
    trunk = RemoteTrunk("t", exchange, is_operator=True)
    for ask in (trunk.send(packet(0)), trunk.commit):
        with pytest.raises(TrunkLost, match="does not serve the run any more") as lost:
            ask()
        assert type(lost.value) is TrunkLost  # by this name a client reports the loss


def test_a_refused_step_is_no_loss(exchange: Exchange) -> None:
    exchange.error = StaleStep("too late")
    with pytest.raises(StaleStep):
        RemoteTrunk("t", exchange, is_operator=False).send(packet(0))()


def test_a_run_begins_by_a_connection_that_is_closed_again(exchange: Exchange) -> None:
    exchange.reply = Begun("trunk-1", "first")
    assert begin_run(exchange, Terms({"seed": "0"}), owner="me") == Begun("trunk-1", "first")
    (line,) = exchange.lines
    assert (line.client, line.is_closed) == (None, True)
    assert line.asked == [(BeginRun(Terms({"seed": "0"}), "me"), "")]


@pytest.mark.parametrize("error", [None, TrunkLost("gone"), RefusedByServer("ABORTED", "restart")], ids=repr)
def test_the_end_of_a_run_is_told_once_and_a_trunk_that_is_gone_needs_not_know(
    error: Exception | None, exchange: Exchange
) -> None:
    exchange.error = error
    trunk = RemoteTrunk("t", exchange, is_operator=True, finish=lambda: finish_run(exchange, "t"))
    trunk.kill()
    trunk.kill()
    (line,) = exchange.lines
    assert line.is_closed
    assert line.asked == ([] if error else [(FinishRun(), "t")])


def test_it_has_no_nodes_and_no_replicas(exchange: Exchange) -> None:
    config = build({})
    trunk = RemoteTrunk("t", exchange, is_operator=True)
    assert trunk.nodes() == [] and trunk.weigh(config) is config
