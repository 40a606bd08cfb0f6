"""The server half of a step: exact gradients, versions, schedules, counted bytes."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import without_dropout

from fedsplit.adaptation import lora
from fedsplit.config import LoraSettings, TrainSettings, TrunkSettings
from fedsplit.model.split import load_parts
from fedsplit.optimization.clipping import coefficient
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.learners import Start
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import EXACT, make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import SpoiledStep, StaleStep, UnboundedStep, UnknownStep

RAW = make_codec("raw")


def make_server(
    path: Path,
    schedule: str,
    dropout: float = 0.0,
    budget: Budget | None = None,
    kernels: str = "library",
    clip: float = 0.0,
) -> TrunkServer:
    (part,) = load_parts(path, (1, 2), ["trunk"], kernels=kernels)
    lora.add(part, LoraSettings(rank=(2,), dropout=dropout), seed=0)
    without_dropout(part)
    for number, parameter in enumerate(lora.parameters(part).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2
    return TrunkServer(part, RAW, schedule, TrainSettings(lr=0.01, clip=clip), seed=5, budget=budget)


def packet(
    client: int, step: int, what: str = "hidden", training: bool = True, wants: bool = True, length: int = 5
) -> Packet:
    generator = torch.Generator().manual_seed(100 * client + step + (what == "hidden"))
    tensor = torch.randn(2, length, 32, generator=generator)
    return Packet(StepKey(1, client, step), {what: RAW.encode(tensor)}, training, wants)


def test_the_gradient_is_the_parts_own_not_the_one_sent(model_path: Path) -> None:
    """The classic mistake is to return the incoming gradient unchanged: its cosine to the true one is near 1."""
    server = make_server(model_path, "shared")
    (part,) = load_parts(model_path, (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(2,), dropout=0.0), seed=0)
    without_dropout(part)
    lora.write(server.learners.read().tensors, part)
    hidden = RAW.decode(packet(0, 0).tensors["hidden"]).requires_grad_()
    expected = part(hidden)
    sent = RAW.decode(packet(0, 0, "gradient").tensors["gradient"])
    expected.backward(sent)
    answer = server.forward(packet(0, 0))
    assert torch.equal(RAW.decode(answer.tensors["hidden"]), expected)
    returned = RAW.decode(server.backward(packet(0, 0, "gradient")).tensors["gradient"])
    assert torch.equal(returned, hidden.grad)
    assert not torch.allclose(returned, sent)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_which_schedules_change_the_adapter(model_path: Path, schedule: str) -> None:
    server = make_server(model_path, schedule)
    before = server.learners.read().tensors
    server.forward(packet(0, 0))
    if SCHEDULES[schedule].returns_gradient:
        assert server.backward(packet(0, 0, "gradient")).tensors
    else:
        with pytest.raises(UnknownStep):
            server.backward(packet(0, 0, "gradient"))
    at_once = schedule in ("shared", "batched")
    after = server.learners.read().tensors
    for name in before:
        assert torch.equal(before[name], after[name]) == (not at_once), name
    counts = server.end_round([0])
    at_the_end = (
        server.learners.copies()[0].adapters.tensors if schedule == "copies" else server.learners.read().tensors
    )
    for name in before:
        assert torch.equal(before[name], at_the_end[name]) == (not SCHEDULES[schedule].learns), name
    assert counts.get("steps", 0) == SCHEDULES[schedule].learns


def test_a_step_of_another_client_does_not_touch_a_pending_gradient(model_path: Path) -> None:
    """Client 0's gradient is for the weights its activations came from, whatever client 1 did meanwhile."""
    alone, shared = (make_server(model_path, "shared", dropout=0.2) for _ in range(2))
    alone.forward(packet(0, 0))
    expected = RAW.decode(alone.backward(packet(0, 0, "gradient")).tensors["gradient"])
    shared.forward(packet(0, 0))
    shared.forward(packet(1, 0))
    shared.backward(packet(1, 0, "gradient"))
    actual = RAW.decode(shared.backward(packet(0, 0, "gradient")).tensors["gradient"])
    assert torch.equal(actual, expected)


def test_dropout_depends_on_the_key_alone(model_path: Path) -> None:
    server = make_server(model_path, "frozen", dropout=0.5)
    torch.manual_seed(1)
    first = RAW.decode(server.forward(packet(0, 0)).tensors["hidden"])
    state = torch.get_rng_state()
    server.forward(packet(1, 0))
    again = RAW.decode(server.forward(packet(0, 0)).tensors["hidden"])
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    other = Packet(StepKey(1, 0, 1), packet(0, 0).tensors)
    assert not torch.equal(RAW.decode(server.forward(other).tensors["hidden"]), first)


def test_evaluation_has_no_dropout_and_keeps_nothing(model_path: Path) -> None:
    server = make_server(model_path, "shared", dropout=0.5)
    outputs = [RAW.decode(server.forward(packet(0, 0, training=False)).tensors["hidden"]) for _ in range(2)]
    assert torch.equal(*outputs)
    assert len(server.steps) == 0


def test_forwards_without_backward_are_counted_and_freed(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    for client in range(3):
        server.forward(packet(client, 0))
    graph = weakref.ref(server.steps.pending()[1])
    assert server.end_round([])["abandoned"] == 3
    gc.collect()
    assert graph() is None
    with pytest.raises(StaleStep, match=r"client 1, step 0"):
        server.backward(packet(1, 0, "gradient"))


def plain_gradients(path: Path, server: TrunkServer, clients: dict[int, int]) -> dict[str, torch.Tensor]:
    """By plain autograd on a part of its own: the sum of the adapter's gradients, and each input's."""
    (part,) = load_parts(path, (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(2,), dropout=0.0), seed=0)
    without_dropout(part)
    lora.write(server.learners.read().tensors, part)
    found = {}
    for client, length in clients.items():
        hidden = RAW.decode(packet(client, 0, length=length).tensors["hidden"]).requires_grad_()
        part(hidden).backward(RAW.decode(packet(client, 0, "gradient", length=length).tensors["gradient"]))
        found[f"input {client}"] = hidden.grad
    return found | {name: parameter.grad for name, parameter in lora.parameters(part).items()}


@pytest.mark.parametrize("lengths", [{0: 5, 1: 5, 2: 5}, {0: 3, 1: 7, 2: 5}])
def test_batched_steps_are_those_of_each_client_and_their_mean(
    model_path: Path, lengths: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the lengths: each gets its own gradient, and the adapter one step with the mean."""
    monkeypatch.setattr("fedsplit.trunk.learner.make_optimizer", lambda p, _: torch.optim.SGD(list(p), lr=0.1))
    server = make_server(model_path, "batched")
    before = server.learners.read().tensors
    expected = plain_gradients(model_path, server, lengths)
    alone = {c: make_server(model_path, "batched").forward(packet(c, 0, length=n)) for c, n in lengths.items()}
    together = server.forward_together([packet(c, 0, length=n) for c, n in lengths.items()])
    for client, answer in zip(lengths, together, strict=True):
        mine, theirs = (RAW.decode(a.tensors["hidden"]) for a in (answer, alone[client]))
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, atol=1e-5)
    answers = server.backward_together([packet(c, 0, "gradient", length=n) for c, n in lengths.items()])
    for client, answer in zip(lengths, answers, strict=True):
        assert torch.allclose(RAW.decode(answer.tensors["gradient"]), expected[f"input {client}"], atol=1e-4), client
    for name, tensor in server.learners.read().tensors.items():
        assert torch.allclose(tensor, before[name] - 0.1 * expected[name] / 3, atol=1e-4), name
    assert server.end_round([])["steps"] == 1
    assert server.traffic["activation_up"] == sum(2 * length * 32 * 4 for length in lengths.values())


@pytest.mark.parametrize("schedule", ["shared", "batched", "accumulate", "copies"])
def test_fused_kernels_train_the_trunk_as_the_library_does(model_path: Path, schedule: str) -> None:
    """AdamW and all, over several steps: a gradient that is right, but laid out otherwise, would show here."""
    trained = []
    for kernels in ("library", "fused"):
        server = make_server(model_path, schedule, kernels=kernels)
        for step in range(4):
            server.forward(packet(0, step))
            server.backward(packet(0, step, "gradient"))
            server.learners.close_window()
        server.end_round([0])
        trained.append(
            (server.learners.copies()[0].adapters if schedule == "copies" else server.learners.read()).tensors
        )
    start = make_server(model_path, schedule).learners.read().tensors
    for name, tensor in trained[0].items():
        assert (tensor - start[name]).abs().max() > 0.01, name
        assert torch.allclose(tensor, trained[1][name], atol=1e-3), name


def test_who_comes_late_to_a_batch_gets_its_gradient_but_does_not_count(model_path: Path) -> None:
    server = make_server(model_path, "batched", dropout=0.3)
    whole = make_server(model_path, "batched", dropout=0.3)
    for trunk in (server, whole):
        trunk.forward_together([packet(0, 0), packet(1, 0)])
    expected = whole.backward_together([packet(0, 0, "gradient"), packet(1, 0, "gradient")])[1]
    server.backward(packet(0, 0, "gradient"))
    after = server.learners.read().tensors
    late = server.backward(packet(1, 0, "gradient"))
    assert torch.allclose(RAW.decode(late.tensors["gradient"]), RAW.decode(expected.tensors["gradient"]), atol=1e-6)
    assert all(torch.equal(after[name], tensor) for name, tensor in server.learners.read().tensors.items())
    counts = server.end_round([])
    assert (counts["steps"], counts["late"], counts["recomputed"]) == (1, 1, 1)


def test_accumulated_gradients_are_one_step_with_their_sum(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.trunk.learner.make_optimizer", lambda p, _: torch.optim.SGD(list(p), lr=0.1))
    server = make_server(model_path, "accumulate")
    before, expected = server.learners.read().tensors, plain_gradients(model_path, server, {0: 5, 1: 5})
    for client in (1, 0):
        server.forward(packet(client, 0))
        server.backward(packet(client, 0, "gradient"))
    assert server.learners.close_window()
    for name, tensor in server.learners.read().tensors.items():
        assert torch.allclose(tensor, before[name] - 0.1 * expected[name], atol=1e-4), name
    assert not server.learners.close_window()


def test_a_gradient_of_the_version_before_the_barrier_does_not_count(model_path: Path) -> None:
    server = make_server(model_path, "accumulate")
    server.forward(packet(0, 0))
    server.forward(packet(1, 0))
    server.backward(packet(0, 0, "gradient"))
    server.learners.close_window()
    assert server.backward(packet(1, 0, "gradient")).tensors
    assert not server.learners.close_window()
    assert server.end_round([0, 1])["late"] == 1


def test_only_clients_that_finished_are_summed_at_the_rounds_end(model_path: Path) -> None:
    one, both = make_server(model_path, "accumulate"), make_server(model_path, "accumulate")
    for server, clients in ((one, [0]), (both, [0, 1])):
        for client in clients:
            server.forward(packet(client, 0))
            server.backward(packet(client, 0, "gradient"))
        server.end_round([0])
    assert all(
        torch.equal(tensor, both.learners.read().tensors[name]) for name, tensor in one.learners.read().tensors.items()
    )


def test_a_copy_depends_on_its_own_client_alone_to_the_bit(model_path: Path) -> None:
    alone, among = (make_server(model_path, "copies", dropout=0.3) for _ in range(2))
    for server, clients in ((alone, [1]), (among, [2, 1, 0])):
        for step in range(3):
            for client in clients:
                server.forward(packet(client, step))
            for client in reversed(clients):
                server.backward(packet(client, step, "gradient"))
        server.end_round(clients)
    one, other = alone.learners.copies()[1].adapters.tensors, among.learners.copies()[1].adapters.tensors
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert sorted(among.learners.copies()) == [0, 1, 2]
    assert any(
        not torch.equal(tensor, among.learners.copies()[0].adapters.tensors[name]) for name, tensor in one.items()
    )
    among.learners.write(one)
    assert among.learners.copies() == {}
    assert all(torch.equal(tensor, among.learners.read().tensors[name]) for name, tensor in one.items())


def test_a_copy_of_another_rank_may_be_what_is_computed_with_first(model_path: Path) -> None:
    """As after `--resume`, where nothing is evaluated before the first step: its scaling is that of its own rank."""
    fresh, used = (make_server(model_path, "copies") for _ in range(2))
    used.forward(packet(0, 0, training=False, wants=False))
    smaller = used.learners.read().with_rank(1).tensors
    found = []
    for server in (fresh, used):
        server.learners.assign({1: Start(smaller)})
        found.append(RAW.decode(server.forward(packet(1, 0)).tensors["hidden"]))
    assert torch.equal(*found)


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
    assert all(torch.equal(t, again.learners.read().tensors[n]) for n, t in kept.learners.read().tensors.items())
    assert "recomputed" not in kept.end_round([])
    assert again.end_round([])["recomputed"] == 2


def test_who_finds_no_room_is_told_to_wait_and_loses_nothing(model_path: Path) -> None:
    resident = 0
    tight = Budget(10**6, resident=lambda: resident, release=lambda: None)
    tight.learn(tokens=1, graph=50_000, working=0)
    server = make_server(model_path, "shared", budget=tight)
    server.forward(packet(0, 0))
    resident = 600_000
    assert server.forward(packet(1, 0)).wait > 0
    assert len(server.steps) == 1
    assert server.backward(packet(0, 0, "gradient")).tensors
    resident = 0
    assert server.forward(packet(1, 0)).tensors
    assert server.end_round([])["waits"] == 1


def question(client: int) -> Packet:
    return Packet(StepKey(1, client, 0), shape=(2, 5, 32))


def test_room_that_was_asked_for_is_kept_free(model_path: Path) -> None:
    """Each packet counts three times while it is on its way, and there are two: hidden states and gradient."""
    tight = Budget(100_000, resident=lambda: 0, release=lambda: None)
    tight.learn(tokens=1, graph=8_000, working=0)  # a step of 10 tokens: 80,000; its packet: 1,280
    server = make_server(model_path, "shared", budget=tight)
    assert [server.ask(question(client)).wait > 0 for client in (0, 1, 2)] == [False, False, True]
    assert server.ask(question(0)).wait == 0  # asked again: it has its room
    assert server.forward(packet(0, 0)).tensors
    assert server.ask(question(2)).wait == 0
    server.leave(1)
    assert server.ask(question(3)).wait == 0
    assert server.traffic["activation_up"] == packet(0, 0).nbytes


def test_graphs_go_before_anybody_is_sent_away(model_path: Path) -> None:
    resident = 0
    tight = Budget(10**6, resident=lambda: resident, release=lambda: None)
    tight.learn(tokens=1, graph=20_000, working=0)
    server = make_server(model_path, "shared", budget=tight)
    server.forward(packet(0, 0))
    assert server.steps.pending()[0].output is not None
    resident = 900_000
    server.ask(question(1))
    assert server.steps.pending()[0].output is None
    assert server.backward(packet(0, 0, "gradient")).tensors
    assert server.end_round([])["recomputed"] == 1


def test_kept_answers_do_not_starve_those_who_wait(model_path: Path) -> None:
    """All have their answers and none goes on: the answers are given up, and who asks for one again is refused."""
    resident = 0
    tight = Budget(10**6, resident=lambda: resident, release=lambda: None)
    tight.learn(tokens=1, graph=20_000, working=0)
    server = make_server(model_path, "shared", budget=tight)
    server.forward(packet(0, 0))
    server.backward(packet(0, 0, "gradient"))
    resident = 900_000
    assert server.ask(question(1)).wait > 0
    with pytest.raises(StaleStep):
        server.backward(packet(0, 0, "gradient"))
    resident = 0
    assert server.ask(question(1)).wait == 0


def test_a_batch_that_finds_room_for_some_serves_those(model_path: Path) -> None:
    tight = Budget(10**6, resident=lambda: 0, release=lambda: None)
    tight.learn(tokens=1, graph=60_000, working=0)
    server = make_server(model_path, "batched", budget=tight)
    answers = server.forward_together([packet(client, 0) for client in range(3)])
    assert [answer.wait > 0 for answer in answers] == [False, True, True]


def test_who_finds_no_room_is_not_refused_for_what_another_one_spoilt(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one that was served spoils it: the others, sent away, are still served as one."""
    server = make_server(tiny_models["gpt2"], "batched")
    room = server._admission.room
    rooms = [lambda inputs: ("graph", 1), room]
    monkeypatch.setattr(server._admission, "room", lambda inputs: rooms.pop(0)(inputs))
    monkeypatch.setattr("fedsplit.trunk.intake.is_bounded", lambda *tensors: True)
    trunk = Dispatcher(server, TrunkSettings(schedule="batched"))
    trunk.begin([0, 1, 2])
    found: dict[int, Any] = {}
    for client in range(3):
        sent = packet(client, 0) if client else with_values(packet(0, 0), 1e30)
        trunk.submit(sent, partial(found.__setitem__, client))
    while trunk.advance():
        pass
    assert isinstance(found[0], UnboundedStep) and all(found[client].tensors for client in (1, 2))
    assert server.counts["forwards"] == 1 and not rooms


@pytest.mark.parametrize(
    ("micro", "micros", "batch", "batches"), [(2, 2, 0, 1), (0, 3, 0, 1), (0, 1, 1, 1), (0, 1, 0, 4)]
)
def test_parts_that_a_step_cannot_have_are_refused(
    tiny_models: dict[str, Path], micro: int, micros: int, batch: int, batches: int
) -> None:
    """By the settings a client has so many keys pending at most, whatever it says."""
    (part,) = load_parts(tiny_models["gpt2"], (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(2,)), seed=0)
    server = TrunkServer(part, RAW, "shared", TrainSettings(micro_batches=2, accumulation=3), seed=0)

    def part_of(what: str, micro: int, micros: int, batch: int, batches: int) -> Packet:
        sent = packet(0, 0, what)
        return replace(sent, key=replace(sent.key, micro=micro, batch=batch), micros=micros, batches=batches)

    forged = part_of("hidden", micro, micros, batch, batches)
    for sent in (forged, replace(forged, tensors={}, shape=(2, 5, 32))):
        with pytest.raises(SpoiledStep, match=r"--micro-batches allows 2 at most, --train\.accumulation 3"):
            (server.forward if sent.tensors else server.ask)(sent)
    server.forward(part_of("hidden", 1, 2, 2, 3))
    with pytest.raises(SpoiledStep, match="micro-batch 1 of 4 in batch 2 of 3"):
        server.backward(part_of("gradient", 1, 4, 2, 3))
    assert server.backward(part_of("gradient", 1, 2, 2, 3)).tensors and len(server.steps) == 0


def test_calibration_sees_what_a_step_holds(model_path: Path) -> None:
    budget = Budget(2**40)
    server = make_server(model_path, "shared", budget=budget)
    before = server.learners.read().tensors
    least = server.calibrate(2, 8)
    assert 10**8 < least < 2**40
    assert 5 * 32 * 4 < budget._graph < 200 * 32 * 4
    assert all(torch.equal(before[name], tensor) for name, tensor in server.learners.read().tensors.items())
    assert len(server.steps) == 0


@pytest.mark.parametrize("shape", [(2, 5, 31), (5, 32), (0, 5, 32)])
def test_hidden_states_of_a_wrong_shape_are_refused(model_path: Path, shape: tuple[int, ...]) -> None:
    server = make_server(model_path, "shared")
    with pytest.raises(SpoiledStep, match="sent hidden states of shape"):
        server.forward(Packet(StepKey(1, 0, 0), {"hidden": RAW.encode(torch.zeros(shape))}))
    assert len(server.steps) == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_another_shape_is_refused(model_path: Path, training: bool) -> None:
    server = make_server(model_path, "shared")
    tensors = {**packet(0, 0).tensors, "mask": RAW.encode(torch.ones(2, 4, dtype=torch.bool))}
    with pytest.raises(SpoiledStep, match=r"sent a mask of shape \(2, 4\), not \(2, 5\)"):
        server.forward(Packet(StepKey(1, 0, 0), tensors, training))
    assert len(server.steps) == 0


def test_bytes_are_those_of_the_tensors(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    server.forward(packet(0, 0))
    server.backward(packet(0, 0, "gradient"))
    server.forward(packet(0, 1, training=False))
    size = 2 * 5 * 32 * 4
    assert server.traffic == {
        "activation_up": size,
        "activation_down": size,
        "gradient_up": size,
        "gradient_down": size,
        "evaluation_activation_up": size,
        "evaluation_activation_down": size,
    }


def test_no_gradient_is_sent_to_a_bottom_that_cannot_use_it(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    before = server.learners.read().tensors
    server.forward(packet(0, 0, wants=False))
    assert server.backward(packet(0, 0, "gradient")).nbytes == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in server.learners.read().tensors.items())


def test_parameters_are_counted_as_trained_only_where_they_are(model_path: Path) -> None:
    shared, frozen = make_server(model_path, "shared").count(), make_server(model_path, "frozen").count()
    assert shared["total"] == frozen["total"]
    assert shared["trainable"] > 0
    assert frozen["trainable"] == 0


def with_values(sent: Packet, value: float) -> Packet:
    """A packet of honest shape whose values are all the same."""
    ((name, encoded),) = sent.tensors.items()
    return replace(sent, tensors={name: RAW.encode(torch.full(encoded.data.shape, value))})


def unchanged(server: TrunkServer, before: dict[str, torch.Tensor]) -> bool:
    """Whether the shared adapter and all that its optimiser remembers are finite, and the adapter as it was."""
    assert all(torch.isfinite(moment).all() for moment in server.learners.moments().values())
    return all(torch.equal(before[name], tensor) for name, tensor in server.learners.read().tensors.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_that_cannot_be_computed_with_are_refused(model_path: Path, value: float, training: bool) -> None:
    server = make_server(model_path, "shared")
    before = server.learners.read().tensors
    with pytest.raises(SpoiledStep, match=r"client 0, step 0.* sent hidden states that are NaN, infinite or too large"):
        server.forward(with_values(packet(0, 0, training=training), value))
    assert unchanged(server, before) and len(server.steps) == 0


@pytest.mark.parametrize("value", [1e20, 1e14, 1e9])
@pytest.mark.parametrize("schedule", ["shared", "batched", "accumulate", "copies"])
def test_a_gradient_that_would_spoil_the_optimiser_is_refused(
    tiny_models: dict[str, Path], schedule: str, value: float
) -> None:
    """Squared it overflows, or AdamW would not forget it; its own client is told, and nothing has changed."""
    server = make_server(tiny_models["gpt2"], schedule)
    before = server.learners.read().tensors
    server.forward(packet(0, 0))
    words = "NaN, infinite or too large" if value > 1e19 else r"has a norm above 1e\+06, the most without --train.clip"
    with pytest.raises(UnboundedStep, match=f"client 0, step 0.* {words}"):
        server.backward(with_values(packet(0, 0, "gradient"), value))
    server.end_round([0])
    assert unchanged(server, before) and "steps" not in server.counts


def test_a_clipped_gradient_may_be_large_and_its_coefficient_may_not(tiny_models: dict[str, Path]) -> None:
    """A client names its own coefficient; the norm of the trunk's part alone bounds what can be true."""
    server = make_server(tiny_models["gpt2"], "shared", clip=1.0)
    before = server.learners.read().tensors
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
def test_in_a_flight_the_others_are_computed_as_if_one_had_left(
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
        assert counts["steps"] == 1 and "late" not in counts
        answers = [
            RAW.decode(found[client, kind].tensors[kind]) for client in (0, 2) for kind in ("hidden", "gradient")
        ]
        return [*answers, *server.learners.read().tensors.values(), *server.learners.moments().values()]

    for one, other in zip(rounds(True), rounds(False), strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()


@pytest.mark.parametrize("odd", ["hidden", "gradient", "coefficient"])
def test_a_frame_too_many_changes_nothing_for_a_flight(tiny_models: dict[str, Path], odd: str) -> None:
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
        assert (counts["forwards"], counts["backwards"], counts["steps"]) == (1, 1, 1)
        answers = {
            (a.key.client, kind): RAW.decode(a.tensors[kind]) for kind in ("hidden", "gradient") for a in found[kind]
        }
        return [*(answers[key] for key in sorted(answers)), *server.learners.read().tensors.values()]

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
            patch.setattr(TrunkServer, "_refuse_unbounded", lambda *args: None)
            hidden = [packet(0, 0), with_values(packet(1, 0), 1e30) if spoils else packet(1, 0), packet(2, 0)]
            server.forward_together(hidden)
        answers = server.backward_together([packet(0, 0, "gradient"), packet(2, 0, "gradient")])
        if spoils:
            with pytest.raises(SpoiledStep, match="was left out, since its hidden states spoilt"):
                server.backward(packet(1, 0, "gradient"))
        assert server.counts["steps"] == 1
        found.append(
            [*(RAW.decode(answer.tensors["gradient"]) for answer in answers), *server.learners.read().tensors.values()]
        )
    assert all(torch.equal(one, other) and torch.isfinite(one).all() for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("hidden", torch.zeros(2, 5, 32, dtype=torch.int64), "an array of torch.int64"),
        ("hidden", torch.zeros(2, 5, 32, dtype=torch.float64), "of type torch.float64, not torch.float32"),
        ("hidden", torch.zeros(1, 999, 32), "sent 999 positions, beyond the model's"),
        ("mask", torch.full((2, 5), math.nan), "a mask of type torch.float32"),
    ],
    ids=["integers", "float64", "too long", "mask"],
)
def test_tensors_of_other_types_are_not_cast(
    tiny_models: dict[str, Path], name: str, tensor: torch.Tensor, words: str
) -> None:
    server = make_server(tiny_models["gpt2"], "shared")
    encoded = RAW.encode(tensor)
    if tensor.dtype == torch.int64:
        encoded = replace(encoded, dtype="float32")
    with pytest.raises(SpoiledStep, match=words):
        server.forward(replace(packet(0, 0), tensors={**packet(0, 0).tensors, name: encoded}))


def test_room_is_promised_for_shapes_alone(tiny_models: dict[str, Path]) -> None:
    """Of a negative size there would be room for everything."""
    server = make_server(tiny_models["gpt2"], "shared", budget=Budget(10**12))
    for shape in ((), (2, 5), (2, 5, 31), (0, 5, 32)):
        with pytest.raises(SpoiledStep, match="asks for room for the shape"):
            server.ask(Packet(StepKey(1, 0, 0), shape=shape))
