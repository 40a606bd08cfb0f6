"""What a waiting request is, and which requests belong together."""

from __future__ import annotations

import numpy as np
import pytest

from fedsplit.trunk.requests import Request, first_forwards, joinable
from fedsplit.trunk.workers import BACKWARD, FORWARD
from fedsplit.wire.casting import array_as
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import Packet, StepKey


def request(client: int = 0, step: int = 0, name: str = "hidden", dtype: str = "float32", **facts: object) -> Request:
    tensors: dict[str, Encoded] = {name: array_as(np.zeros(2), dtype)} if name else {}
    packet = Packet(StepKey(1, client, step), tensors, **facts)  # type: ignore[arg-type]
    return Request(packet, arrived=0.0, done=lambda answer: None)


@pytest.mark.parametrize(
    ("one", "worker", "is_step", "teaches"),
    [
        (request(), FORWARD, True, True),
        (request(training=False), FORWARD, False, False),
        (request(learns=False), FORWARD, True, False),
        (request(name="gradient"), BACKWARD, True, True),
        (request(name="coefficient"), BACKWARD, True, True),
        (request(name=""), FORWARD, False, False),
    ],
    ids=["forward", "evaluation", "of a trunk that does not learn", "gradient", "coefficient", "admission"],
)
def test_a_request_knows_its_worker_and_whether_its_order_matters(
    one: Request, worker: str, is_step: bool, teaches: bool
) -> None:
    assert (one.worker, one.is_step, one.teaches) == (worker, is_step, teaches)
    assert one.is_admission == (not one.packet.tensors)


def test_equal_packets_are_two_requests() -> None:
    assert request() != request()


def test_the_earliest_forward_of_each_client_counts_however_they_arrive() -> None:
    requests = [request(client, step) for client, step in ((1, 1), (0, 2), (1, 0), (0, 1))]
    requests.append(request(2, name="gradient"))
    first = {one.client: one.packet.key.step for one in first_forwards(requests)}
    assert first == {0: 1, 1: 0}


def test_forwards_are_joined_if_their_types_and_their_need_of_gradients_agree() -> None:
    kinds = [request(), request(client=1), request(dtype="float16"), request(wants_gradient=False)]
    first, same, narrower, without_gradient = (joinable(one.packet) for one in kinds)
    assert first == same
    assert first != narrower and first != without_gradient
