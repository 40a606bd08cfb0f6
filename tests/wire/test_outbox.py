"""The outbox of a stream: what counts against the client's window."""

from __future__ import annotations

import asyncio

import pytest
from grpc_parties import packet

from fedsplit.wire.chunks import Refused
from fedsplit.wire.outbox import Outbox


def test_two_packets_of_any_size_do_not_count() -> None:
    outbox = Outbox(most=3)
    outbox.take(10**9)
    assert outbox.held() == 0
    outbox.take(5)
    assert outbox.held() == 10**9 + 5


def test_the_answer_counts_in_place_of_the_packet_until_it_is_sent() -> None:
    async def scenario() -> None:
        outbox = Outbox(most=3)
        tickets = [outbox.take(100), outbox.take(100)]
        for ticket in tickets:
            outbox.put(ticket, 7, packet(size=9))
        assert outbox.held() == 2 * 36
        outbox.put(tickets[0], 7, ValueError("no answer"))
        assert outbox.held() == 36
        assert (await outbox.get())[:2] == (tickets[0], 7)

    asyncio.run(scenario())


def test_the_end_waits_for_all_answers() -> None:
    async def scenario() -> None:
        outbox = Outbox(most=3)
        await outbox.drained()
        tickets = [outbox.take(1), outbox.take(1)]
        waiting = asyncio.ensure_future(outbox.drained())
        outbox.sent(tickets[0])
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox.sent(tickets[1])
        await asyncio.wait_for(waiting, 30)

    asyncio.run(scenario())


def test_too_many_packets_without_an_answer_are_refused() -> None:
    outbox = Outbox(most=2)
    ticket = outbox.take(1)
    outbox.take(1)
    with pytest.raises(Refused, match="more than 2 packets wait for an answer") as refused:
        outbox.take(1)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    outbox.sent(ticket)
    outbox.take(1)
