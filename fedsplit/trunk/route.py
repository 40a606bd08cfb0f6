"""The way of a packet through the stages of a trunk: hidden states from the bottom up, gradients from the top down.

A stage is asked for its own blocks and for the rest of the trunk above the blocks. The way is written once, as a
generator of questions. `travel` asks and waits, as in one process. `fedsplit.trunk.relay` asks without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Literal

import torch

from fedsplit.model.routers import SUMS
from fedsplit.wire.casting import EXACT
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import EXAMPLES, Packet
from fedsplit.wire.transport import PendingAnswer

Where = Literal["own", "rest"]
"""The stage's own blocks, or the rest of the trunk above them."""

Way = Generator[tuple[Where, Packet], Packet, Packet]
"""Yields questions with their addressees, takes the answers, and returns the answer to the client."""


def way_of(packet: Packet, learns: bool) -> Way:
    """Returns the way of a packet through a stage and the rest of the trunk.

    Args:
        packet: A client's packet, or the packet of the stage below.
        learns: True if the trunk's adapter is trained. The rest then owes the stage a gradient in any case.
    """
    if packet.clips:
        yield "rest", packet
        # Every stage scales its gradient by the same coefficient, and the lowest one answers the client.
        return (yield "own", packet)
    if "gradient" in packet.tensors:
        # This stage begins its backward from the rest's gradient, even if the client's bottom needs none.
        above = yield "rest", replace(packet, wants_gradient=True)
        own = yield "own", replace(packet, tensors=_gradients_below(packet, above))
        return _with_joined_norm(own, above)
    own = yield "own", packet
    if own.wait:  # memory is short, and the client asks again
        return own
    if not own.tensors:  # an admission, or the end of a session
        return (yield "rest", packet)
    further = {name: packet.tensors[name] for name in ("mask", EXAMPLES) if name in packet.tensors}
    wants_gradient = packet.wants_gradient or (packet.training and learns)
    return (yield "rest", replace(packet, tensors={**own.tensors, **further}, wants_gradient=wants_gradient))


def _gradients_below(packet: Packet, above: Packet) -> dict[str, Encoded]:
    """Returns the tensors of a stage's backward: the gradient from the rest of the trunk, all others from the client.

    The stages only add to the router sums, so the gradient by the sums is the same at every stage.
    """
    tensors = {"gradient": above.tensors["gradient"]}
    for name in (SUMS, EXAMPLES):
        if name in packet.tensors:
            tensors[name] = packet.tensors[name]
    return tensors


def _with_joined_norm(own: Packet, above: Packet) -> Packet:
    """Returns a stage's answer to a gradient, with the squared norm over the stage and the rest of the trunk."""
    norms = []
    for answer in (own, above):
        if "norm" in answer.tensors:
            norm = EXACT.decode(answer.tensors["norm"])
            norms.append(float(norm))
    if not norms:
        return own
    # Stages have disjoint parameters, so that the squares of their norms add up to the square of the whole.
    joined = EXACT.encode(torch.tensor(sum(norms), dtype=torch.float64))
    return replace(own, tensors={**own.tensors, "norm": joined})


def travel(way: Way, own: Callable[[Packet], PendingAnswer], rest: Callable[[Packet], PendingAnswer]) -> PendingAnswer:
    """Sends the first question of a way, and returns a function that waits for the answer to the client.

    Args:
        way: Result of `way_of`.
        own: Sends a packet to the stage's own blocks without waiting.
        rest: Sends a packet to the rest of the trunk without waiting.
    """
    senders = {"own": own, "rest": rest}
    where, packet = next(way)
    pending = senders[where](packet)
    known: list[Packet] = []  # a generator can be gone through only once, but an answer may be asked for again

    def wait() -> Packet:
        answer = pending()
        while not known:
            try:
                where, packet = way.send(answer)
            except StopIteration as end:
                known.append(end.value)
            else:
                answer = senders[where](packet)()
        return known[0]

    return wait
