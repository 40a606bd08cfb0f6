"""The event loop of gRPC: one thread of the process, shared by all servers and clients.

gRPC's asyncio library has one poller for the process. With several loops, a loop may take the wake-up of another.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None

_END_SECONDS = 5.0


def event_loop() -> asyncio.AbstractEventLoop:
    """Returns the running event loop. The first call starts the thread."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_loop.run_forever, name="grpc", daemon=True)
            thread.start()
            atexit.register(_end, _loop, thread)
        return _loop


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Ends the thread before the interpreter takes the thread's modules away."""
    loop.call_soon_threadsafe(loop.stop)
    thread.join(_END_SECONDS)


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Starts a coroutine on the event loop.

    Example:
        >>> start(asyncio.sleep(0, "done")).result()
        'done'
    """
    return asyncio.run_coroutine_threadsafe(work, event_loop())
