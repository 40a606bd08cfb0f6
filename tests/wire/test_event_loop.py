"""The event loop: one thread for all, which does not keep a program from its end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

from fedsplit.wire.event_loop import event_loop, start


def test_all_threads_get_the_same_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    threads = [threading.Thread(target=lambda: loops.append(event_loop())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(loops) == 8 and len(set(map(id, loops))) == 1


def test_work_runs_on_the_thread_of_the_loop() -> None:
    async def name() -> str:
        return threading.current_thread().name

    assert start(name()).result(30) == "grpc"


SCRIPT = """
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_address import GrpcAddress
from fedsplit.wire.packets import Packet, StepKey
server = GrpcServer(lambda packet, done: done(packet), token=b"t")
client = GrpcClient(GrpcAddress("127.0.0.1", server.port, token=b"t"))
client.send(Packet(StepKey(1, 0, 0)))()
print("answered")
"""


def test_a_program_ends_in_silence_with_its_streams_open() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "answered\n", "")
