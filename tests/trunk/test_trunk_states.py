"""Exactly once: whatever clients, the network and crashes do, every step counts once, with its own gradient.

Hypothesis drives a trunk through forwards, gradients, repeats, lost leases, clients that leave and restarts, and
holds it against plain autograd and plain steps on copies of the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import ExpiredStep, ForeignStep, RefusedStep, SpoiledStep, StaleStep, UnknownStep

RAW = make_codec("raw")
LEASE = 10.0
WIDTH = 3
NAME = "lora_A.weight"
LUCK = st.integers(0, 4)
"""What ends much happens rarely, or nothing would ever be under way for long."""


def sgd(parameters: Iterable[Tensor], settings: object = None) -> torch.optim.Optimizer:
    """In place of AdamW, whose steps hardly depend on the size of a gradient: a wrong sum must show."""
    return torch.optim.SGD(list(parameters), lr=0.1)


class Toy(nn.Module):
    """A trunk of one adapted layer."""

    config = SimpleNamespace(hidden_size=WIDTH, max_position_embeddings=16)
    dtype = torch.float32
    adapter = frozenset({"lora_A.default.weight"})
    rank_budget = None

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, WIDTH, bias=False)})
        with torch.no_grad():
            self.lora_A["default"].weight.copy_(torch.eye(WIDTH) * 0.5)

    def unsplit_name(self, name: str) -> str:
        return name

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.lora_A["default"](hidden))


class TrainableAdapter:
    """What an adapter and its optimiser must do."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight.clone())
        self.optimizer = sgd([self.weight])

    def step(self, gradient: Tensor) -> None:
        self.weight.grad = gradient.clone()
        self.optimizer.step()


@dataclass
class Pending:
    packet: Packet
    weight: Tensor
    answer: Tensor


@dataclass
class Held:
    """A step whose gradient waits to be scaled."""

    packet: Packet
    weights: list[Tensor]
    gradient: Tensor


class Trunk(RuleBasedStateMachine):
    """The model: who has what pending, and what every adapter must be."""

    schedule = "shared"
    limit: int | None = None
    clip = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.now, self.life, self.round = 0.0, 0, 1
        self.saved = torch.eye(WIDTH) * 0.5
        self.generator = torch.Generator().manual_seed(0)

    @initialize()
    def start(self) -> None:
        self.life += 1
        budget = None if self.limit is None else Budget(self.limit, resident=lambda: 0, release=lambda: None)
        if budget is not None:
            budget.learn(tokens=1, graph=10**6, working=0)
        self.server = TrunkServer(
            Toy(),  # type: ignore[arg-type]
            RAW,
            self.schedule,
            TrainSettings(clip=self.clip, micro_batches=2, accumulation=2),
            seed=0,
            run="run",
            incarnation=str(self.life),
            lease=LEASE,
            budget=budget,
            clock=lambda: self.now,
        )
        self.server.adapters.write({NAME: self.saved})
        self.shared = TrainableAdapter(self.saved)
        self.own: dict[int, TrainableAdapter] = {}
        self.sums: dict[int, Tensor] = {}
        self.partial: dict[int, tuple[tuple[int, int, int], int, Tensor, list[Tensor]]] = {}
        self.held: dict[StepKey, Held] = {}
        self.scaled: dict[StepKey, Packet] = {}
        self.plans: dict[int, tuple[int, int]] = {}
        self.pending: dict[StepKey, Pending] = {}
        self.answered: dict[StepKey, tuple[Packet, Tensor]] = {}
        self.expired: dict[StepKey, Packet] = {}
        self.places: dict[int, tuple[int, int, int, int]] = {}
        self.left: set[int] = set()

    def learner(self, client: int) -> TrainableAdapter:
        if self.schedule != "copies":
            return self.shared
        return self.own.setdefault(client, TrainableAdapter(self.shared.weight.detach()))

    def forget(self, client: int) -> None:
        self.pending = {key: p for key, p in self.pending.items() if key.client != client}
        self.answered = {key: p for key, p in self.answered.items() if key.client != client}
        self.expired = {key: p for key, p in self.expired.items() if key.client != client}
        self.held = {key: h for key, h in self.held.items() if key.client != client}
        self.scaled = {key: p for key, p in self.scaled.items() if key.client != client}

    def packet(self, key: StepKey, micros: int, name: str = "hidden", batches: int = 1) -> Packet:
        tensor = torch.randn(1, 2, WIDTH, generator=self.generator)
        return Packet(key, {name: RAW.encode(tensor)}, micros=micros, batches=batches, incarnation=str(self.life))

    def pick(self, choice: int, things: dict[StepKey, Any]) -> StepKey:
        return sorted(things, key=lambda key: (key.client, key.place, key.micro))[choice % len(things)]

    @rule(
        client=st.integers(0, 2),
        skip=st.integers(0, 2),
        attempt=st.integers(0, 1),
        micros=st.integers(1, 2),
        batches=st.integers(1, 2),
    )
    def forward(self, client: int, skip: int, attempt: int, micros: int, batches: int) -> None:
        round, before, step, batch = self.places.get(client, (self.round, 0, -1, 0))
        planned = self.plans.get(client, (1, 1))
        if skip == 0 and round == self.round and attempt <= before and batch + 1 < planned[1]:
            (micros, batches), batch, attempt = planned, batch + 1, before  # the next batch of the same step
        else:
            step = step + max(1, skip) if round == self.round and attempt <= before else 0
            attempt, batch = max(attempt, before if round == self.round else 0), 0
        self.plans[client] = micros, batches
        place = (self.round, attempt, step, batch)
        self.forget(client)
        self.left.discard(client)
        self.places[client] = place
        for micro in range(micros):
            key = StepKey(self.round, client, step, attempt, micro, "run", batch)
            packet = self.packet(key, micros, batches=batches)
            weight = self.learner(client).weight.detach().clone()
            answer = RAW.decode(self.server.forward(packet).tensors["hidden"])
            hidden = RAW.decode(packet.tensors["hidden"])
            assert torch.allclose(answer, torch.tanh(hidden @ weight.T), atol=1e-6)
            self.pending[packet.key] = Pending(packet, weight, answer)

    @precondition(lambda self: self.pending)
    @rule(choice=st.integers(0, 9))
    def forward_again(self, choice: int) -> None:
        pending = self.pending[self.pick(choice, self.pending)]
        again = RAW.decode(self.server.forward(pending.packet).tensors["hidden"])
        assert torch.equal(again, pending.answer)

    @precondition(lambda self: self.pending)
    @rule(choice=st.integers(0, 9), more=st.integers(0, 9))
    def backward(self, choice: int, more: int) -> None:
        self.gradient(choice)
        if more > 4 and self.pending:
            self.gradient(choice)

    def gradient(self, choice: int) -> None:
        key = self.pick(choice, self.pending)
        pending = self.pending.pop(key)
        sent = self.packet(key, pending.packet.micros, "gradient", pending.packet.batches)
        hidden = RAW.decode(pending.packet.tensors["hidden"]).clone().requires_grad_()
        weight = pending.weight.requires_grad_()
        gradient = RAW.decode(sent.tensors["gradient"])
        expected, learned = torch.autograd.grad(torch.tanh(hidden @ weight.T), [hidden, weight], gradient)
        back = self.server.backward(sent)
        answer = RAW.decode(back.tensors["gradient"])
        assert torch.allclose(answer, expected, atol=1e-6)
        self.answered[key] = (sent, answer)
        whole = self.count(key, pending, learned)
        assert ("norm" in back.tensors) == (whole is not None)
        if whole is not None:
            assert float(EXACT.decode(back.tensors["norm"])) == pytest.approx(float(whole.gradient.norm() ** 2), 1e-4)
            self.held[sent.clipping_key] = whole

    def count(self, key: StepKey, pending: Pending, gradient: Tensor) -> Held | None:
        """What becomes of a gradient; with clipping, the whole one of a step that is complete."""
        if self.schedule == "accumulate" and not self.clip:
            self.add_to_window(key.client, [pending.weight], gradient)
            return None
        turn, done, total, weights = self.partial.get(key.client, (key.turn, 0, torch.zeros(WIDTH, WIDTH), []))
        if turn != key.turn:
            done, total, weights = 0, torch.zeros(WIDTH, WIDTH), []
        done, total, weights = done + 1, total + gradient, [*weights, pending.weight]
        if done < pending.packet.parts:
            self.partial[key.client] = (key.turn, done, total, weights)
            return None
        self.partial.pop(key.client, None)
        if self.clip:
            return Held(pending.packet, weights, total)
        self.learner(key.client).step(total)
        return None

    def add_to_window(self, client: int, weights: list[Tensor], gradient: Tensor) -> None:
        if all(torch.equal(weight, self.shared.weight) for weight in weights):
            self.sums[client] = self.sums.get(client, torch.zeros(WIDTH, WIDTH)) + gradient

    def coefficient(self, key: StepKey, value: float) -> Packet:
        tensors = {"coefficient": EXACT.encode(torch.tensor(value, dtype=torch.float64))}
        return Packet(key, tensors, micros=key.micro, batches=key.batch + 1, incarnation=str(self.life))

    @precondition(lambda self: self.held)
    @rule(choice=st.integers(0, 9), value=st.sampled_from([0.125, 0.25, 1.0]))
    def scale(self, choice: int, value: float) -> None:
        key = self.pick(choice, self.held)
        sent = self.coefficient(key, value)
        for wrong in (-0.5, 1.5, float("nan")):
            with pytest.raises(SpoiledStep):
                self.server.backward(self.coefficient(key, wrong))
        with pytest.raises(StaleStep):  # it is no forward, and no gradient is wanted
            self.server.forward(self.packet(key, key.micro))
        with pytest.raises(UnknownStep):
            self.server.backward(self.packet(key, key.micro, "gradient"))
        assert not self.server.backward(sent).tensors
        held = self.held.pop(key)
        self.scaled[key] = sent
        if self.schedule == "accumulate":
            self.add_to_window(key.client, held.weights, held.gradient * value)
        else:
            self.learner(key.client).step(held.gradient * value)

    @precondition(lambda self: self.scaled)
    @rule(choice=st.integers(0, 9))
    def scale_again(self, choice: int) -> None:
        self.server.backward(self.scaled[self.pick(choice, self.scaled)])

    @precondition(lambda self: self.clip and self.pending)
    @rule(choice=st.integers(0, 9))
    def scale_what_has_no_gradient(self, choice: int) -> None:
        key = self.pick(choice, self.pending)
        with pytest.raises(UnknownStep):
            self.server.backward(self.coefficient(key, 1.0))

    @precondition(lambda self: self.answered)
    @rule(choice=st.integers(0, 9))
    def backward_again(self, choice: int) -> None:
        sent, answer = self.answered[self.pick(choice, self.answered)]
        assert torch.equal(RAW.decode(self.server.backward(sent).tensors["gradient"]), answer)

    @precondition(lambda self: self.answered)
    @rule(choice=st.integers(0, 9))
    def forward_of_what_is_done(self, choice: int) -> None:
        key = self.pick(choice, self.answered)
        sent, _ = self.answered[key]
        with pytest.raises(StaleStep):
            self.server.forward(self.packet(key, sent.micros, batches=sent.batches))

    @precondition(lambda self: self.pending)
    @rule(choice=st.integers(0, 9))
    def spoiled(self, choice: int) -> None:
        key = self.pick(choice, self.pending)
        known = self.pending[key].packet
        for tensor in (torch.full((1, 2, WIDTH), torch.nan), torch.zeros(1, 1, WIDTH)):
            with pytest.raises(SpoiledStep):
                self.server.backward(replace(known, tensors={"gradient": RAW.encode(tensor)}))
        with pytest.raises(SpoiledStep):
            self.server.backward(self.packet(key, known.micros + 2, "gradient", known.batches))

    @rule(client=st.integers(0, 2))
    def unknown(self, client: int) -> None:
        with pytest.raises(UnknownStep):
            self.server.backward(self.packet(StepKey(99, client, 0, run="run"), 1, "gradient"))

    @rule(client=st.integers(0, 2))
    def foreign(self, client: int) -> None:
        key = StepKey(99, client, 0, run="run")
        with pytest.raises(ForeignStep):
            self.server.forward(self.packet(replace(key, run="other"), 1))
        with pytest.raises(ForeignStep):
            self.server.forward(replace(self.packet(key, 1), incarnation=str(self.life - 1)))

    @precondition(lambda self: self.pending)
    @rule(luck=LUCK)
    def expire(self, luck: int) -> None:
        if luck:
            return
        self.now += LEASE
        self.server.expire()
        for key, pending in self.pending.items():
            self.expired[key] = pending.packet
        self.pending.clear()
        for key in self.held:
            with pytest.raises(ExpiredStep):
                self.server.backward(self.coefficient(key, 1.0))
        self.held.clear()

    @precondition(lambda self: self.expired)
    @rule(choice=st.integers(0, 9))
    def too_late(self, choice: int) -> None:
        key = self.pick(choice, self.expired)
        with pytest.raises(ExpiredStep):
            self.server.backward(self.packet(key, 1, "gradient"))

    @rule(client=st.integers(0, 2), luck=LUCK)
    def leave(self, client: int, luck: int) -> None:
        if luck:
            return
        gone = [pending.packet.key for pending in self.pending.values() if pending.packet.key.client == client]
        held = [key for key in self.held if key.client == client]
        self.server.leave(client)
        self.forget(client)
        if self.schedule != "accumulate" or self.clip:
            self.partial.pop(client, None)
        for key in held:
            with pytest.raises(StaleStep):
                self.server.backward(self.coefficient(key, 1.0))
        for key in gone:
            with pytest.raises(StaleStep):
                self.server.backward(self.packet(key, 1, "gradient"))

    @precondition(lambda self: self.schedule == "accumulate")
    @rule()
    def barrier(self) -> None:
        """Gradients that are under way now will be of an old version, and count no more."""
        self.server.adapters.close_window()
        if self.sums:
            self.shared.step(torch.stack([self.sums[client] for client in sorted(self.sums)]).sum(0))
        self.sums.clear()

    @rule(luck=LUCK)
    def end_round(self, luck: int) -> None:
        if luck:
            return
        self.server.end_round([0, 1])
        if self.schedule == "accumulate" and (sums := [self.sums[c] for c in (0, 1) if c in self.sums]):
            self.shared.step(torch.stack(sums).sum(0))
        if self.schedule == "copies":
            assert sorted(self.server.adapters.copies()) == sorted(set(self.own) & {0, 1})
            self.server.adapters.write({NAME: self.saved})
            self.shared.weight.data.copy_(self.saved)
        for client in {key.client for key in (*self.pending, *self.held)}:
            self.forget(client)
            self.partial.pop(client, None)
        if self.clip:
            self.partial.clear()
        self.sums.clear()
        self.own.clear()
        self.round += 1
        self.saved = self.server.adapters.read().tensors[NAME].clone()

    @rule(luck=LUCK)
    def kill_and_restart(self, luck: int) -> None:
        """What was pending is lost, what was saved is not, and nothing from before is taken for something of now."""
        if luck:
            return
        old = [pending.packet for pending in self.pending.values()]
        old += [self.coefficient(key, 1.0) for key in self.held]
        self.start()
        for packet in old:
            with pytest.raises(ForeignStep):
                self.server.backward(packet)

    @invariant()
    def every_step_has_counted_once(self) -> None:
        if not hasattr(self, "server"):
            return
        assert len(self.server.steps) == len(self.pending) + len(self.held)
        assert torch.allclose(self.server.adapters.read().tensors[NAME], self.shared.weight, atol=1e-5)
        for client, copy in self.server.adapters.copies().items():
            assert torch.allclose(copy.adapters.tensors[NAME], self.own[client].weight, atol=1e-5)


class Copies(Trunk):
    schedule = "copies"


class Accumulate(Trunk):
    schedule = "accumulate"


class Recomputing(Trunk):
    """Under a budget that has room for inputs, but for no graph."""

    limit = 2_500_000


class Clipping(Trunk):
    """A step counts with its coefficient, and not before."""

    clip = 1e6  # so large that any coefficient may be right


class ClippingCopies(Copies):
    clip = 1e6  # so large that any coefficient may be right


class ClippingAccumulate(Accumulate):
    clip = 1e6  # so large that any coefficient may be right


MACHINES = [Trunk, Copies, Accumulate, Recomputing, Clipping, ClippingCopies, ClippingAccumulate]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_counts_once(machine: type[Trunk], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.trunk.trainable.make_optimizer", sgd)
    count = 40 if machine.clip else 120
    run_state_machine_as_test(machine, settings=settings(max_examples=count, stateful_step_count=30, deadline=None))


def test_refusals_have_one_family() -> None:
    for refusal in (UnknownStep, StaleStep, ExpiredStep, ForeignStep, SpoiledStep):
        assert issubclass(refusal, RefusedStep)
