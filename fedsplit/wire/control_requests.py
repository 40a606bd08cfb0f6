"""Control requests of a gRPC server: each is carried out once, however often the operator has to send it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

Reply = bytes | Exception
"""The reply to a control request, or the error in place of a reply."""

_MOST_KEPT = 16
"""Most requests that are kept for a repetition. An operator has few requests at once, and repeats no older ones."""


class ControlRequests:
    """Requests by identity, with their replies, until the operator has the reply. Not thread-safe."""

    def __init__(
        self,
        control: Callable[[bytes, Callable[[Reply], None]], None],
    ) -> None:
        """Has no requests.

        Args:
            control: Called with a request, and a function that takes the reply. Must not wait.
        """
        self._control = control
        self._replies: dict[str, asyncio.Future[Reply]] = {}

    async def reply(self, identity: str, request: bytes) -> Reply:
        """Carries out a request, or waits for the reply to the same request as before."""
        future = self._replies.get(identity)
        if future is None:
            future = self._start(identity, request)
        # Shielded: a stream that breaks must not take the reply from the stream that comes next.
        return await asyncio.shield(future)

    def _start(self, identity: str, request: bytes) -> asyncio.Future[Reply]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()

        def take(reply: Reply) -> None:
            if not future.done():
                future.set_result(reply)

        def done(reply: Reply) -> None:
            with contextlib.suppress(RuntimeError):  # the program ends
                loop.call_soon_threadsafe(take, reply)

        self._replies[identity] = future
        self._control(request, done)
        self._drop_old()
        return future

    def _drop_old(self) -> None:
        """Drops the oldest replies beyond `_MOST_KEPT`."""
        # Only requests with a reply are dropped. Somebody waits for each of the others.
        done = [identity for identity, future in self._replies.items() if future.done()]
        for identity in done[: max(0, len(self._replies) - _MOST_KEPT)]:
            del self._replies[identity]

    def confirm(self, identity: str) -> None:
        """Drops a reply that the operator has."""
        self._replies.pop(identity, None)
