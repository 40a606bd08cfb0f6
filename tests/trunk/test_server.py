"""The server half of a step: exact gradients, versions, schedules, counted bytes."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import without_dropout

from fedsplit.adaptation import lora
from fedsplit.model.split import load_parts
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.trunk.copies import Start
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import SpoiledStep, StaleStep, UnknownStep

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
    lora.write(server.adapters.read().tensors, part)
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
    before = server.adapters.read().tensors
    server.forward(packet(0, 0))
    if SCHEDULES[schedule].returns_gradient:
        assert server.backward(packet(0, 0, "gradient")).tensors
    else:
        with pytest.raises(UnknownStep):
            server.backward(packet(0, 0, "gradient"))
    at_once = schedule in ("shared", "batched")
    after = server.adapters.read().tensors
    for name in before:
        assert torch.equal(before[name], after[name]) == (not at_once), name
    counts = server.end_round([0])
    at_the_end = (
        server.adapters.copies()[0].adapters.tensors if schedule == "copies" else server.adapters.read().tensors
    )
    for name in before:
        assert torch.equal(before[name], at_the_end[name]) == (not SCHEDULES[schedule].learns), name
    assert counts.steps == SCHEDULES[schedule].learns


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
    assert server.end_round([]).abandoned == 3
    gc.collect()
    assert graph() is None
    with pytest.raises(StaleStep, match=r"client 1, step 0"):
        server.backward(packet(1, 0, "gradient"))


def plain_gradients(path: Path, server: TrunkServer, clients: dict[int, int]) -> dict[str, torch.Tensor]:
    """By plain autograd on a part of its own: the sum of the adapter's gradients, and each input's."""
    (part,) = load_parts(path, (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(2,), dropout=0.0), seed=0)
    without_dropout(part)
    lora.write(server.adapters.read().tensors, part)
    found = {}
    for client, length in clients.items():
        hidden = RAW.decode(packet(client, 0, length=length).tensors["hidden"]).requires_grad_()
        part(hidden).backward(RAW.decode(packet(client, 0, "gradient", length=length).tensors["gradient"]))
        found[f"input {client}"] = hidden.grad
    return found | {name: parameter.grad for name, parameter in lora.parameters(part).items()}


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding alone, which goes by the largest of the values."""
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.parametrize("lengths", [{0: 5, 1: 5, 2: 5}, {0: 3, 1: 7, 2: 5}])
def test_batched_steps_are_those_of_each_client_and_their_mean(
    model_path: Path, lengths: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the lengths: each gets its own gradient, and the adapter one step with the mean."""
    monkeypatch.setattr("fedsplit.trunk.trainable.make_optimizer", lambda p, _: torch.optim.SGD(list(p), lr=0.1))
    server = make_server(model_path, "batched")
    before = server.adapters.read().tensors
    expected = plain_gradients(model_path, server, lengths)
    alone = {c: make_server(model_path, "batched").forward(packet(c, 0, length=n)) for c, n in lengths.items()}
    together = server.forward_together([packet(c, 0, length=n) for c, n in lengths.items()])
    for client, answer in zip(lengths, together, strict=True):
        mine, theirs = (RAW.decode(a.tensors["hidden"]) for a in (answer, alone[client]))
        assert mine.shape == theirs.shape
        assert is_close(mine, theirs)
    answers = server.backward_together([packet(c, 0, "gradient", length=n) for c, n in lengths.items()])
    for client, answer in zip(lengths, answers, strict=True):
        assert is_close(RAW.decode(answer.tensors["gradient"]), expected[f"input {client}"]), client
    for name, tensor in server.adapters.read().tensors.items():
        assert is_close(tensor, before[name] - 0.1 * expected[name] / 3), name
    assert server.end_round([]).steps == 1
    assert server.traffic.activation.up == sum(2 * length * 32 * 4 for length in lengths.values())


@pytest.mark.parametrize("schedule", ["shared", "batched", "accumulate", "copies"])
def test_fused_kernels_train_the_trunk_as_the_library_does(model_path: Path, schedule: str) -> None:
    """AdamW and all, over several steps: a gradient that is right, but laid out otherwise, would show here."""
    trained = []
    for kernels in ("library", "fused"):
        server = make_server(model_path, schedule, kernels=kernels)
        for step in range(4):
            server.forward(packet(0, step))
            server.backward(packet(0, step, "gradient"))
            server.adapters.close_window()
        server.end_round([0])
        trained.append(
            (server.adapters.copies()[0].adapters if schedule == "copies" else server.adapters.read()).tensors
        )
    start = make_server(model_path, schedule).adapters.read().tensors
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
    after = server.adapters.read().tensors
    late = server.backward(packet(1, 0, "gradient"))
    assert torch.allclose(RAW.decode(late.tensors["gradient"]), RAW.decode(expected.tensors["gradient"]), atol=1e-6)
    assert all(torch.equal(after[name], tensor) for name, tensor in server.adapters.read().tensors.items())
    counts = server.end_round([])
    assert (counts.steps, counts.late, counts.recomputed) == (1, 1, 1)


def test_accumulated_gradients_are_one_step_with_their_sum(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.trunk.trainable.make_optimizer", lambda p, _: torch.optim.SGD(list(p), lr=0.1))
    server = make_server(model_path, "accumulate")
    before, expected = server.adapters.read().tensors, plain_gradients(model_path, server, {0: 5, 1: 5})
    for client in (1, 0):
        server.forward(packet(client, 0))
        server.backward(packet(client, 0, "gradient"))
    assert server.adapters.close_window()
    for name, tensor in server.adapters.read().tensors.items():
        assert torch.allclose(tensor, before[name] - 0.1 * expected[name], atol=1e-4), name
    assert not server.adapters.close_window()


def test_a_gradient_of_the_version_before_the_barrier_does_not_count(model_path: Path) -> None:
    server = make_server(model_path, "accumulate")
    server.forward(packet(0, 0))
    server.forward(packet(1, 0))
    server.backward(packet(0, 0, "gradient"))
    server.adapters.close_window()
    assert server.backward(packet(1, 0, "gradient")).tensors
    assert not server.adapters.close_window()
    assert server.end_round([0, 1]).late == 1


def test_only_clients_that_finished_are_summed_at_the_rounds_end(model_path: Path) -> None:
    one, both = make_server(model_path, "accumulate"), make_server(model_path, "accumulate")
    for server, clients in ((one, [0]), (both, [0, 1])):
        for client in clients:
            server.forward(packet(client, 0))
            server.backward(packet(client, 0, "gradient"))
        server.end_round([0])
    assert all(
        torch.equal(tensor, both.adapters.read().tensors[name]) for name, tensor in one.adapters.read().tensors.items()
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
    one, other = alone.adapters.copies()[1].adapters.tensors, among.adapters.copies()[1].adapters.tensors
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert sorted(among.adapters.copies()) == [0, 1, 2]
    assert any(
        not torch.equal(tensor, among.adapters.copies()[0].adapters.tensors[name]) for name, tensor in one.items()
    )
    among.adapters.write(one)
    assert among.adapters.copies() == {}
    assert all(torch.equal(tensor, among.adapters.read().tensors[name]) for name, tensor in one.items())


def test_a_copy_of_another_rank_may_be_what_is_computed_with_first(model_path: Path) -> None:
    """As after `--resume`, where nothing is evaluated before the first step: its scaling is that of its own rank."""
    fresh, used = (make_server(model_path, "copies") for _ in range(2))
    used.forward(packet(0, 0, training=False, wants=False))
    smaller = used.adapters.read().with_rank(1).tensors
    found = []
    for server in (fresh, used):
        server.adapters.assign({1: Start(smaller)})
        found.append(RAW.decode(server.forward(packet(1, 0)).tensors["hidden"]))
    assert torch.equal(*found)


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
    before = server.adapters.read().tensors
    least = server.calibrate(2, 8)
    assert 10**8 < least < 2**40
    assert 5 * 32 * 4 < budget._graph < 200 * 32 * 4
    assert all(torch.equal(before[name], tensor) for name, tensor in server.adapters.read().tensors.items())
    assert len(server.steps) == 0


def test_bytes_are_those_of_the_tensors(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    server.forward(packet(0, 0))
    server.backward(packet(0, 0, "gradient"))
    server.forward(packet(0, 1, training=False))
    size = 2 * 5 * 32 * 4
    assert server.traffic.document() == {
        "activation_up": size,
        "activation_down": size,
        "gradient_up": size,
        "gradient_down": size,
        "evaluation_activation_up": size,
        "evaluation_activation_down": size,
    }


def test_no_gradient_is_sent_to_a_bottom_that_cannot_use_it(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    before = server.adapters.read().tensors
    server.forward(packet(0, 0, wants=False))
    assert server.backward(packet(0, 0, "gradient")).nbytes == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in server.adapters.read().tensors.items())


def test_parameters_are_counted_as_trained_only_where_they_are(model_path: Path) -> None:
    shared, frozen = make_server(model_path, "shared").count(), make_server(model_path, "frozen").count()
    assert shared["total"] == frozen["total"]
    assert shared["trainable"] > 0
    assert frozen["trainable"] == 0


def with_values(sent: Packet, value: float) -> Packet:
    """A packet of honest shape whose values are all the same."""
    ((name, encoded),) = sent.tensors.items()
    return replace(sent, tensors={name: RAW.encode(torch.full(RAW.decode(encoded).shape, value))})


def unchanged(server: TrunkServer, before: dict[str, torch.Tensor]) -> bool:
    """Whether the shared adapter and all that its optimiser remembers are finite, and the adapter as it was."""
    assert all(torch.isfinite(moment).all() for moment in server.adapters.moments().values())
    return all(torch.equal(before[name], tensor) for name, tensor in server.adapters.read().tensors.items())
