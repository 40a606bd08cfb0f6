"""Streams to a gRPC server: how a refusal is told. `test_grpc_client` and `test_grpc_server` open real ones."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from fedsplit.errors import InputError
from fedsplit.wire.grpc_address import GrpcAddress
from fedsplit.wire.grpc_calls import BROKEN, RefusedByServer, ServerStreams, telling_cancellations_apart


def test_a_refusal_crosses_processes_with_its_status() -> None:
    refusal = pickle.loads(pickle.dumps(RefusedByServer("RESOURCE_EXHAUSTED", "too many streams")))
    assert refusal.status == "RESOURCE_EXHAUSTED"
    assert str(refusal) == "the trunk's server refuses the stream: too many streams (RESOURCE_EXHAUSTED)"


def test_no_stream_leaves_the_machine_without_certificates() -> None:
    with pytest.raises(InputError):
        ServerStreams(GrpcAddress("trunk.example", 50052, "", b"token"))


def test_a_stream_that_the_peer_cancels_is_broken_and_a_task_that_is_cancelled_ends() -> None:
    async def ended_by_peer() -> None:
        with telling_cancellations_apart():
            raise asyncio.CancelledError

    async def cancelled_here() -> None:
        with telling_cancellations_apart():
            await asyncio.sleep(60)

    async def both() -> None:
        with pytest.raises(BROKEN):
            await ended_by_peer()
        task = asyncio.ensure_future(cancelled_here())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(both())
