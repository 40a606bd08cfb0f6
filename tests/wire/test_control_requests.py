"""Control requests: one that comes again is not carried out again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fedsplit.wire.control_requests import ControlRequests, Reply


class Trunk:
    """Counts requests, and replies when a test says so."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.done: list[Callable[[Reply], None]] = []

    def control(self, request: bytes, done: Callable[[Reply], None]) -> None:
        self.asked.append(request)
        self.done.append(done)


def test_a_repeated_request_gets_the_reply_of_the_first() -> None:
    async def scenario() -> None:
        trunk = Trunk()
        requests = ControlRequests(trunk.control)
        first = asyncio.ensure_future(requests.reply("one", b"request"))
        await asyncio.sleep(0)
        first.cancel()  # its stream broke
        second = asyncio.ensure_future(requests.reply("one", b"request"))
        await asyncio.sleep(0)
        trunk.done[0](b"reply")
        assert await second == await requests.reply("one", b"request") == b"reply"
        assert trunk.asked == [b"request"]

    asyncio.run(scenario())


def test_a_confirmed_reply_is_dropped_and_other_requests_stand_alone() -> None:
    async def scenario() -> None:
        trunk = Trunk()
        requests = ControlRequests(lambda request, done: (trunk.control(request, done), done(request[::-1]))[1])
        assert await requests.reply("one", b"ab") == b"ba"
        requests.confirm("one")
        assert await requests.reply("one", b"cd") == b"dc"
        assert await requests.reply("two", b"ef") == b"fe"
        assert len(trunk.asked) == 3

    asyncio.run(scenario())


def test_few_replies_are_kept_and_no_request_is_dropped_before_its_reply() -> None:
    async def scenario() -> None:
        trunk = Trunk()
        requests = ControlRequests(trunk.control)
        slow = asyncio.ensure_future(requests.reply("slow", b"slow"))
        for number in range(40):
            quick = asyncio.ensure_future(requests.reply(f"{number}", b"quick"))
            await asyncio.sleep(0)
            trunk.done[-1](b"reply")
            await quick
        assert len(requests._replies) <= 17
        trunk.done[0](b"at last")
        assert await slow == await requests.reply("slow", b"slow") == b"at last"
        assert trunk.asked.count(b"slow") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("reply", [b"reply", ValueError("no")], ids=["reply", "error"])
def test_a_second_reply_changes_nothing(reply: Reply) -> None:
    async def scenario() -> None:
        trunk = Trunk()
        requests = ControlRequests(trunk.control)
        waiting = asyncio.ensure_future(requests.reply("one", b"request"))
        await asyncio.sleep(0)
        trunk.done[0](reply)
        trunk.done[0](b"second")
        assert await waiting is reply

    asyncio.run(scenario())
