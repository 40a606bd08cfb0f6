"""Sessions at the trunk: each token once, in order, to its own session, and for no longer than a lease."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from split_models import RAW, parts_of, server_of
from torch import Tensor

from fedsplit.model.parts import Trunk
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.sessions import EarlyStep, FullTrunk, Sessions
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import ExpiredStep, ForeignStep, RefusedStep, SpoiledStep, StaleStep, UnknownStep

WIDTH, LEASE = 32, 10.0


def packet(
    session: str, step: int, hidden: Tensor | None, client: int = 0, mask: Tensor | None = None, as_type: str = ""
) -> Packet:
    tensors = {} if hidden is None else {"hidden": RAW.encode(hidden)}
    if as_type:
        tensors["hidden"] = replace(tensors["hidden"], header={"dtype": as_type})
    if mask is not None:
        tensors["mask"] = RAW.encode(mask)
    key = StepKey(0, client, step, run="run", session=session)
    return Packet(key, tensors, training=False, incarnation="first")


def answer(sessions: Sessions, *what: object, **how: object) -> Tensor:
    return RAW.decode(sessions.serve(packet(*what, **how)).tensors["hidden"])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trunk(tiny_models: dict[str, Path]) -> Trunk:
    return parts_of(tiny_models["mistral"], (1, 2))[1]


@dataclass
class Known:
    """What a session must be."""

    client: int
    hidden: Tensor
    answers: list[tuple[Packet, Tensor]] = field(default_factory=list)
    until: float = 0.0


class Machine(RuleBasedStateMachine):
    """Sessions of two clients, held against the trunk without any memory on everything a session was sent."""

    part: Trunk

    def __init__(self) -> None:
        super().__init__()
        self.now, self.names = 0.0, 0
        self.sessions = Sessions(server_of(self.part), LEASE, most=3, clock=lambda: self.now)
        self.known: dict[str, Known] = {}
        self.over: dict[str, type[RefusedStep]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, WIDTH, generator=self.generator)

    def pick(self, choice: int) -> tuple[str, Known]:
        return list(self.known.items())[choice % len(self.known)]

    def serve(self, name: str, hidden: Tensor) -> None:
        known = self.known[name]
        sent = packet(name, len(known.answers), hidden, known.client)
        found = RAW.decode(self.sessions.serve(sent).tensors["hidden"])
        with torch.no_grad():
            expected = self.part(known.hidden)[:, -hidden.shape[1] :]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        known.answers.append((sent, found))
        known.until = self.now + LEASE

    @precondition(lambda self: len(self.known) < 3)
    @rule(client=st.integers(0, 1), rows=st.integers(1, 2), count=st.integers(1, 7))
    def begin(self, client: int, rows: int, count: int) -> None:
        self.names += 1
        name, hidden = f"s{self.names}", self.draw(rows, count)
        self.known[name] = Known(client, hidden)
        self.serve(name, hidden)

    @precondition(lambda self: self.known)
    @rule(choice=st.integers(0, 9))
    def go_on(self, choice: int) -> None:
        name, known = self.pick(choice)
        hidden = self.draw(known.hidden.shape[0], 1)
        known.hidden = torch.cat([known.hidden, hidden], 1)
        self.serve(name, hidden)

    @precondition(lambda self: self.known)
    @rule(choice=st.integers(0, 9))
    def again(self, choice: int) -> None:
        _, known = self.pick(choice)
        sent, before = known.answers[-1]
        assert torch.equal(RAW.decode(self.sessions.serve(sent).tensors["hidden"]), before)
        known.until = self.now + LEASE

    @precondition(lambda self: self.known)
    @rule(choice=st.integers(0, 9), off=st.integers(-3, 3))
    def out_of_order(self, choice: int, off: int) -> None:
        name, known = self.pick(choice)
        step = len(known.answers) + off
        if step < 0 or off in (-1, 0):
            return
        with pytest.raises(StaleStep if off < 0 else EarlyStep, match=f"session {name}, client {known.client}"):
            self.sessions.serve(packet(name, step, self.draw(known.hidden.shape[0], 1), known.client))

    @precondition(lambda self: self.known)
    @rule(choice=st.integers(0, 9))
    def spoilt(self, choice: int) -> None:
        name, known = self.pick(choice)
        rows, step = known.hidden.shape[0], len(known.answers)
        for wrong in (self.draw(rows, 2), self.draw(rows + 1, 1), torch.full((rows, 1, WIDTH), torch.nan)):
            with pytest.raises(SpoiledStep):
                self.sessions.serve(packet(name, step, wrong, known.client))

    @precondition(lambda self: self.known)
    @rule(choice=st.integers(0, 9))
    def another_clients(self, choice: int) -> None:
        name, known = self.pick(choice)
        for hidden in (self.draw(known.hidden.shape[0], 1), None):
            with pytest.raises(UnknownStep):
                self.sessions.serve(packet(name, len(known.answers), hidden, 1 - known.client))

    @precondition(lambda self: len(self.known) == 3)
    @rule()
    def too_many(self) -> None:
        with pytest.raises(FullTrunk, match="3 sessions already"):
            self.sessions.serve(packet("more", 0, self.draw(1, 2)))

    @precondition(lambda self: self.known)
    @rule(choice=st.integers(0, 9), luck=st.integers(0, 2))
    def end(self, choice: int, luck: int) -> None:
        if luck:
            return
        name, known = self.pick(choice)
        for _ in range(2):
            assert not self.sessions.serve(packet(name, len(known.answers), None, known.client)).tensors
        self.over[name] = StaleStep
        del self.known[name]

    @rule(client=st.integers(0, 1), luck=st.integers(0, 4))
    def leave(self, client: int, luck: int) -> None:
        if luck:
            return
        self.sessions.leave(client)
        for name in [name for name, known in self.known.items() if known.client == client]:
            self.over[name] = StaleStep
            del self.known[name]

    @rule(seconds=st.sampled_from([1.0, LEASE / 2, LEASE]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for name in [name for name, known in self.known.items() if known.until <= self.now]:
            self.over[name] = ExpiredStep
            del self.known[name]
        self.sessions.expire()

    @precondition(lambda self: self.over)
    @rule(choice=st.integers(0, 9), step=st.integers(0, 2))
    def what_is_over(self, choice: int, step: int) -> None:
        """Its prompt, too: one that was under way for long must not open it anew."""
        name, refusal = list(self.over.items())[choice % len(self.over)]
        with pytest.raises(refusal):
            self.sessions.serve(packet(name, step, self.draw(1, 1)))

    @rule(step=st.integers(1, 3))
    def unknown(self, step: int) -> None:
        with pytest.raises(UnknownStep):
            self.sessions.serve(packet("nobody's", step, self.draw(1, 1)))
        with pytest.raises(ForeignStep):
            self.sessions.serve(replace(packet("x", 0, self.draw(1, 1)), incarnation="second"))

    @invariant()
    def nothing_is_kept_of_what_is_over(self) -> None:
        assert len(self.sessions) == len(self.known)
        # Keys and values of a window less one: two heads of eight numbers of four bytes.
        kept = sum(min(k.hidden.shape[1], 4) * k.hidden.shape[0] for k in self.known.values())
        assert self.sessions.nbytes == kept * 2 * 2 * 8 * 4
        assert self.sessions.next_expiry() == min((k.until for k in self.known.values()), default=None)


def test_every_token_counts_once_and_for_its_own_session(trunk: Trunk) -> None:
    machine = type("OfThisTrunk", (Machine,), {"part": trunk})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))


def test_bytes_are_counted_once_as_prompt_and_as_token(trunk: Trunk) -> None:
    server = server_of(trunk)
    sessions = Sessions(server, LEASE)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    sessions.serve(packet("s", 0, torch.randn(2, 3, WIDTH), mask=mask))
    for _ in range(2):
        sessions.serve(packet("s", 1, torch.randn(2, 1, WIDTH)))
    position = WIDTH * 4
    assert server.traffic.document() == {
        "prompt_up": 6 * position + 6,
        "prompt_down": 6 * position,
        "token_up": 2 * position,
        "token_down": 2 * position,
        "repeated_up": 2 * position,
        "repeated_down": 2 * position,
    }


def test_a_session_goes_on_with_the_version_that_it_began_with(tiny_models: dict[str, Path]) -> None:
    (_, part, _), (_, old, _) = (parts_of(tiny_models["gpt2"], (1, 2)) for _ in range(2))
    server = server_of(part)
    sessions, hidden = Sessions(server, LEASE), torch.randn(1, 4, WIDTH)
    answer(sessions, "s", 0, hidden[:, :3])
    server.adapters.write({name: tensor * 0 for name, tensor in server.adapters.read().tensors.items()})
    after = answer(sessions, "s", 1, hidden[:, 3:])
    with torch.no_grad():
        torch.testing.assert_close(after, old(hidden)[:, 3:], rtol=1e-4, atol=1e-4)
    other = answer(sessions, "t", 0, hidden)
    assert not torch.allclose(other[:, 3:], after, atol=1e-2)


def test_training_and_texts_do_not_disturb_each_other(tiny_models: dict[str, Path]) -> None:
    """Dropout is on in a step, and off in a session between two of them."""
    found = []
    for texts in (False, True):
        _, part, _ = parts_of(tiny_models["gpt2"], (1, 2))
        server = server_of(part)
        sessions, generator = Sessions(server, LEASE), torch.Generator().manual_seed(1)
        for step in range(3):
            key = StepKey(1, 0, step, run="run")
            for name in ("hidden", "gradient"):
                sent = Packet(
                    key, {name: RAW.encode(torch.randn(2, 5, WIDTH, generator=generator))}, incarnation="first"
                )
                (server.forward if name == "hidden" else server.backward)(sent)
                if texts:
                    answer(sessions, f"s{step}{name}", 0, torch.randn(1, 4, WIDTH))
                    answer(sessions, f"s{step}{name}", 1, torch.randn(1, 1, WIDTH))
        found.append(server.adapters.read().tensors)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_what_cannot_be_served_is_refused_by_name(trunk: Trunk) -> None:
    sessions = Sessions(server_of(trunk), LEASE)
    for wrong, words in (
        (packet("s", 0, torch.randn(2, WIDTH)), "sent no hidden|not \\(B, T, 32\\)"),
        (packet("s", 0, torch.randn(2, 3, WIDTH + 1)), r"shape \(2, 3, 33\), not \(B, T, 32\)"),
        (packet("s", 0, torch.randn(1, 33, WIDTH)), "33 positions, beyond the model's 32"),
        (packet("s", 0, torch.randn(0, 3, WIDTH)), r"shape \(0, 3, 32\)"),
        (packet("s", 0, torch.randn(1, 3, WIDTH), mask=torch.tensor([[True, False, True]])), "padded on the left"),
        (packet("s", 0, torch.randn(1, 3, WIDTH), mask=torch.tensor([[True, True]])), r"shape \(1, 2\), not \(1, 3\)"),
        (packet("s", 0, torch.randn(1, 3, WIDTH), mask=torch.ones(1, 3)), "mask of type torch.float32"),
        (packet("s", 0, torch.randn(1, 3, WIDTH).double()), "of type torch.float64, not torch.float32"),
        (packet("s", 0, torch.full((1, 3, WIDTH), 1e30)), "too large to compute with"),
        (packet("s", 0, torch.ones(1, 3, WIDTH).long(), as_type="float32"), "in a wrong form: an array of torch.int64"),
        (
            replace(packet("s", 0, None), tensors={"mask": RAW.encode(torch.ones(1, 1))}),
            "sent no hidden|not \\(B, T, 32\\)",
        ),
    ):
        with pytest.raises(SpoiledStep, match=words):
            sessions.serve(wrong)
        assert len(sessions) == 0
    answer(sessions, "s", 0, torch.randn(1, 32, WIDTH))
    with pytest.raises(SpoiledStep, match="beyond"):
        sessions.serve(packet("s", 1, torch.randn(1, 1, WIDTH)))


def test_a_budget_of_memory_holds_for_texts(trunk: Trunk) -> None:
    resident = [0]
    budget = Budget(1000, resident=lambda: resident[0], release=lambda: None)
    budget.learn(tokens=1, graph=10, working=100)
    sessions = Sessions(server_of(trunk, budget=budget), LEASE)
    with pytest.raises(FullTrunk, match="no room"):
        sessions.serve(packet("s", 0, torch.randn(1, 11, WIDTH)))
    first = answer(sessions, "s", 0, torch.randn(1, 5, WIDTH))
    resident[0] = 950
    with pytest.raises(FullTrunk, match="session s, client 0, step 1"):
        sessions.serve(packet("s", 1, torch.randn(1, 1, WIDTH)))
    resident[0] = 100
    assert answer(sessions, "s", 1, first[:, :1]).shape == (1, 1, WIDTH)


def test_a_session_whose_computation_fails_is_over(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(server_of(trunk), LEASE)
    answer(sessions, "s", 0, torch.randn(1, 3, WIDTH))
    with monkeypatch.context() as patch:
        patch.setattr("fedsplit.trunk.sessions.Past.extend", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sessions.serve(packet("s", 1, torch.randn(1, 1, WIDTH)))
    with pytest.raises(StaleStep, match="given up"):
        sessions.serve(packet("s", 1, torch.randn(1, 1, WIDTH)))


def test_why_a_session_is_over_is_known_of_the_newest_only(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.trunk.sessions._REMEMBERED", 2)
    sessions = Sessions(server_of(trunk), LEASE)
    for name in "abc":
        sessions.serve(packet(name, 0, None))
    with pytest.raises(UnknownStep):
        sessions.serve(packet("a", 1, torch.randn(1, 1, WIDTH)))
    with pytest.raises(StaleStep):
        sessions.serve(packet("c", 1, torch.randn(1, 1, WIDTH)))
