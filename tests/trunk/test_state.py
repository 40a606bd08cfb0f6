"""What the steps of a trunk share: a step that waits for its coefficient has no batch any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_server import make_server, packet

from fedsplit.trunk.pending import PendingBatch
from fedsplit.wire.steps import UnknownStep


def test_a_step_has_a_batch_until_its_gradient_has_come(tiny_models: dict[str, Path]) -> None:
    server = make_server(tiny_models["gpt2"], "shared", clip=1.0)
    first, gradient = packet(0, 0), packet(0, 0, "gradient")
    server.forward(first)
    assert isinstance(server._state.pending_batch(first.key), PendingBatch)
    server.backward(gradient)
    with pytest.raises(UnknownStep, match="no forward is pending for"):
        server._state.pending_batch(gradient.clipping_key)
    with pytest.raises(UnknownStep, match="no forward is pending for"):
        server._state.pending_batch(first.key)
