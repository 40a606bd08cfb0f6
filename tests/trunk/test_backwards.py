"""Backwards: gradients that are computed again, clipped, or refused, and whom a refusal leaves untouched."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_server import RAW, make_server, packet, unchanged, with_values

from fedsplit.optimization.clipping import coefficient
from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.memory import Budget
from fedsplit.wire.casting import EXACT
from fedsplit.wire.packets import Packet
from fedsplit.wire.steps import SpoiledStep, UnboundedStep, UnknownStep


def test_recomputing_changes_no_bit(model_path: Path) -> None:
    """Same input, same version, same dropout, though others have stepped since."""
    tight = Budget(10**6, resident=lambda: 0, release=lambda: None)
    tight.learn(tokens=1, graph=80_000, working=0)
    kept, again = make_server(model_path, "shared", dropout=0.3), make_server(model_path, "shared", 0.3, budget=tight)
    for server in (kept, again):
        for client in (0, 1):
            server.forward(packet(client, 0))
    for client in (0, 1):
        one, two = (server.backward(packet(client, 0, "gradient")) for server in (kept, again))
        assert torch.equal(RAW.decode(one.tensors["gradient"]), RAW.decode(two.tensors["gradient"]))
    assert all(torch.equal(t, again.adapters.read().tensors[n]) for n, t in kept.adapters.read().tensors.items())
    assert not kept.end_round([]).recomputed
    assert again.end_round([]).recomputed == 2


@pytest.mark.parametrize("value", [1e20, 1e14, 1e9])
@pytest.mark.parametrize("schedule", ["shared", "batched", "accumulate", "copies"])
def test_a_gradient_that_would_spoil_the_optimiser_is_refused(
    tiny_models: dict[str, Path], schedule: str, value: float
) -> None:
    """Squared it overflows, or AdamW would not forget it; its own client is told, and nothing has changed."""
    server = make_server(tiny_models["gpt2"], schedule)
    before = server.adapters.read().tensors
    server.forward(packet(0, 0))
    words = "NaN, infinite or too large" if value > 1e19 else r"has a norm above 1e\+06, the most without --train.clip"
    with pytest.raises(UnboundedStep, match=f"client 0, step 0.* {words}"):
        server.backward(with_values(packet(0, 0, "gradient"), value))
    server.end_round([0])
    assert unchanged(server, before) and not server.counts.steps


def test_a_clipped_gradient_may_be_large_and_its_coefficient_may_not(tiny_models: dict[str, Path]) -> None:
    """A client names its own coefficient; the norm of the trunk's part alone bounds what can be true."""
    server = make_server(tiny_models["gpt2"], "shared", clip=1.0)
    before = server.adapters.read().tensors
    server.forward(packet(0, 0))
    sent = with_values(packet(0, 0, "gradient"), 1e16)
    norm = math.sqrt(float(EXACT.decode(server.backward(sent).tensors["norm"])))
    assert norm > 1e15
    honest = coefficient(norm**2, 1.0)

    def scale(value: float, dtype: torch.dtype = torch.float64) -> Packet:
        return Packet(sent.clipping_key, {"coefficient": EXACT.encode(torch.tensor(value, dtype=dtype))})

    for lie in (1.0, honest * 1.01, -honest, math.nan):
        with pytest.raises(SpoiledStep, match="to scale its gradient by, not a number from 0 to"):
            server.backward(scale(lie))
    with pytest.raises(SpoiledStep, match="to scale its gradient by"):
        server.backward(scale(0, torch.int64))
    assert unchanged(server, before)
    server.backward(scale(honest))
    assert not unchanged(server, before)


@pytest.mark.parametrize(
    ("what", "value"),
    [("hidden", math.nan), ("hidden", 1e30), ("gradient", math.nan), ("gradient", 1e30), ("gradient", 1e16)],
)
def test_in_a_batch_the_others_are_computed_as_if_one_had_left(
    tiny_models: dict[str, Path], what: str, value: float
) -> None:
    """To the bit: outputs, gradients, adapter and moments are those of a trunk that the client left at that point."""

    def rounds(spoils: bool) -> list[torch.Tensor]:
        server = make_server(tiny_models["gpt2"], "batched", dropout=0.3)
        trunk = Dispatcher(server, TrunkSettings(schedule="batched"))
        trunk.begin([0, 1, 2])
        found: dict[tuple[int, str], Any] = {}
        for kind in ("hidden", "gradient"):
            for client in (2, 1, 0):
                sent = packet(client, 0, kind, length=4 + client)
                if client == 1 and kind == what:
                    if not spoils:
                        trunk.leave(1)
                        continue
                    sent = with_values(sent, value)
                trunk.submit(sent, partial(found.__setitem__, (client, kind)))
            while trunk.advance():
                pass
            if isinstance(found.get((1, kind)), Exception):
                trunk.leave(1)
                while trunk.advance():
                    pass
        if spoils:
            assert isinstance(refused := found[1, what], SpoiledStep) and "client 1, step 0" in str(refused)
        counts = trunk.end_round([0, 2])
        assert (counts.steps, counts.late) == (1, 0)
        answers = [
            RAW.decode(found[client, kind].tensors[kind]) for client in (0, 2) for kind in ("hidden", "gradient")
        ]
        return [*answers, *server.adapters.read().tensors.values(), *server.adapters.moments().values()]

    for one, other in zip(rounds(True), rounds(False), strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()


@pytest.mark.parametrize("odd", ["hidden", "gradient", "coefficient"])
def test_a_frame_too_many_changes_nothing_for_a_batch(tiny_models: dict[str, Path], odd: str) -> None:
    """What comes twice, or scales a gradient that nobody asked about, is of its own client alone: to the bit."""

    def rounds(kind_of_odd: str) -> list[torch.Tensor]:
        server = make_server(tiny_models["gpt2"], "batched", dropout=0.3)
        trunk = Dispatcher(server, TrunkSettings(schedule="batched"))
        trunk.begin([0, 1, 2])
        found: dict[str, list[Any]] = {"hidden": [], "gradient": [], "coefficient": []}
        for kind in ("hidden", "gradient"):
            for client in (1, 1, 0, 2) if kind == kind_of_odd else (1, 0, 2):
                if (client, kind, kind_of_odd) == (1, "gradient", "coefficient"):
                    one = {"coefficient": EXACT.encode(torch.tensor(1.0, dtype=torch.float64))}
                    trunk.submit(replace(packet(1, 0), tensors=one), found["coefficient"].append)
                trunk.submit(packet(client, 0, kind), found[kind].append)
            while trunk.advance():
                pass
        assert [type(answer) for answer in found["coefficient"]] == [UnknownStep] * (kind_of_odd == "coefficient")
        assert len(server.steps) == 0
        counts = trunk.end_round([0, 1, 2])
        assert (counts.forwards, counts.backwards, counts.steps) == (1, 1, 1)
        answers = {
            (a.key.client, kind): RAW.decode(a.tensors[kind]) for kind in ("hidden", "gradient") for a in found[kind]
        }
        return [*(answers[key] for key in sorted(answers)), *server.adapters.read().tensors.values()]

    assert all(torch.equal(one, other) for one, other in zip(rounds(odd), rounds("nothing"), strict=True))


def test_who_sends_no_gradient_does_not_spoil_those_of_others(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times zero, what is infinite within the trunk is NaN: such a step is found, and its rows are zeros."""
    found = []
    for spoils in (True, False):
        server = make_server(tiny_models["gpt2"], "batched")
        with monkeypatch.context() as patch:
            patch.setattr("fedsplit.trunk.intake.is_bounded", lambda *tensors: True)
            patch.setattr("fedsplit.trunk.forwards._refuse_unbounded", lambda *args: None)
            hidden = [packet(0, 0), with_values(packet(1, 0), 1e30) if spoils else packet(1, 0), packet(2, 0)]
            server.forward_together(hidden)
        answers = server.backward_together([packet(0, 0, "gradient"), packet(2, 0, "gradient")])
        if spoils:
            with pytest.raises(SpoiledStep, match="was left out, since its hidden states spoilt"):
                server.backward(packet(1, 0, "gradient"))
        assert server.counts.steps == 1
        found.append(
            [*(RAW.decode(answer.tensors["gradient"]) for answer in answers), *server.adapters.read().tensors.values()]
        )
    assert all(torch.equal(one, other) and torch.isfinite(one).all() for one, other in zip(*found, strict=True))
