"""Who sends what cannot be used is named and left out, and the others end with the numbers of a clean failure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_federation import federate
from scripted_parties import WORK, gather
from test_round import config_of, without_times
from torch import Tensor

from fedsplit.client.link import Link, PendingStep
from fedsplit.errors import SettingError
from fedsplit.events.event_types import ClientFailed
from fedsplit.federation import evaluation, quarantine, training
from fedsplit.federation.attempts import Attempt
from fedsplit.federation.messages import ADAPTERS, CONTROL, Answer, Failure, Reply, Request, Train, measured, trained
from fedsplit.scores import Score
from fedsplit.trunk.copies import Copy
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Task
from fedsplit.wire.packets import StepKey

# -------------------- every field, with every kind of spoil

VALUES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e30": 1e30,
    "huge": 10**400,
    "negative": -1,
    "text": "ten",
    "list": [1, 2],
    "true": True,
    "missing": None,
}
"""What may stand in the place of a number."""

TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda tensor: tensor * math.nan,
    "one nan": lambda tensor: tensor.index_fill(0, torch.tensor([0]), math.nan),
    "inf": lambda tensor: tensor + math.inf,
    "-inf": lambda tensor: tensor - math.inf,
    "1e30": lambda tensor: tensor + 1e30,
    "wrong shape": lambda tensor: tensor[:1],
    "broadcastable": lambda tensor: tensor[:1, :1],
    "one dimension more": lambda tensor: tensor[None],
    "empty": lambda tensor: tensor[:0],
    "float64": lambda tensor: tensor.double(),
    "float16": lambda tensor: tensor.half(),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "text": lambda tensor: "a tensor",
    "missing": lambda tensor: None,
}
"""What may stand in the place of a tensor."""

LAYER = "b.lora_A.weight"


def honest(client: int, start: Adapters, control: bool = False, routers: bool = False) -> Reply:
    """Returns what a client sends that has trained."""
    changed = start.with_tensors({name: tensor + 0.1 for name, tensor in start.tensors.items()})
    sent = {name: torch.full_like(tensor, 0.5) for name, tensor in start.tensors.items()} if control else {}
    loss = 0.5 if routers else None
    update = ClientUpdate(client, changed, examples=8, tokens=100, loss=2.0, control=sent, router_loss=loss)
    return trained(update, start.tensors, Score(1.5, 3), peak_memory=10)


def with_metric(reply: Reply, name: str, value: Any) -> Reply:
    metrics = {**reply.metrics, name: value}
    return replace(reply, metrics={key: kept for key, kept in metrics.items() if kept is not None})


def with_tensor(reply: Reply, group: str, change: Callable[[Tensor], Any]) -> Reply:
    tensors = dict(reply.tensors[group])
    tensors[LAYER] = change(tensors[LAYER])
    return replace(reply, tensors={**reply.tensors, group: {n: t for n, t in tensors.items() if t is not None}})


def play(
    spoil: Callable[[Reply], Reply], folder: Path, control: bool = False, routers: bool = False, **settings: Any
) -> tuple[training.Training, list[str]]:
    """Plays the training of a round in which client 1 is spoilt; also the lines on the screen."""

    def answer(request: Request) -> Answer:
        reply = honest(request.client, state.ledger.start, control, routers)
        return spoil(reply) if request.client == 1 else reply

    parties, state = gather(answer, folder, **settings)
    parties = replace(parties, workloads=[replace(WORK, routers=routers)] * 3)
    start = state.ledger.start
    variates = {name: torch.zeros_like(tensor) for name, tensor in start.tensors.items()} if control else None
    assigned = {client: Assignment(start, Task(control=variates)) for client in range(3)}
    found = training.train(parties, state, 1, assigned, Attempt())
    assert state.ledger.accepted == {update.client: 1 for update in found.updates}
    return found, parties.emit.lines  # type: ignore[attr-defined]


def is_left_out_alone(found: training.Training, lines: list[str]) -> bool:
    """Returns True if client 1 was left out, in one short line that names it, and the others go on."""
    (line,) = lines
    assert line.startswith("client 1 (bob)") and line.endswith("; it is left out") and "\n" not in line
    assert len(line) < 250
    return [update.client for update in found.updates] == [0, 2] == [reply.client for reply in found.replies]


NUMBERS = ("client", "num-examples", "tokens", "loss", "sample-nats", "sample-tokens", "peak-memory", "router-loss")


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_an_update_that_cannot_be_is_of_its_client_alone(name: str, kind: str, tmp_path: Path) -> None:
    assert len(play(lambda reply: reply, tmp_path / "whole", routers=True)[0].updates) == 3
    found, lines = play(lambda reply: with_metric(reply, name, VALUES[kind]), tmp_path, routers=True)
    assert is_left_out_alone(found, lines)


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("group", [ADAPTERS, CONTROL])
def test_a_tensor_of_an_update_that_cannot_be_is_of_its_client_alone(group: str, kind: str, tmp_path: Path) -> None:
    assert len(play(lambda reply: reply, tmp_path / "whole", control=True)[0].updates) == 3
    found, lines = play(lambda reply: with_tensor(reply, group, TENSORS[kind]), tmp_path, control=True)
    assert is_left_out_alone(found, lines)


def without(group: str) -> Callable[[Reply], Reply]:
    return lambda reply: replace(reply, tensors={name: t for name, t in reply.tensors.items() if name != group})


def with_more(group: str, name: str) -> Callable[[Reply], Reply]:
    return lambda reply: replace(
        reply, tensors={**reply.tensors, group: {**reply.tensors.get(group, {}), name: torch.ones(2, 3)}}
    )


GROUPS: dict[str, Callable[[Reply], Reply]] = {
    "no adapters": without(ADAPTERS),
    "no control variate": without(CONTROL),
    "nothing": lambda reply: Reply(reply.client),
    "another group": with_more("bottom", LAYER),
    "another adapter": with_more(ADAPTERS, "x.lora_A.weight"),
    "another control variate": with_more(CONTROL, "x.lora_A.weight"),
    "unreadable": lambda reply: replace(reply, malformed="b.lora_A.weight is no array (ValueError)"),
    "a router-loss": lambda reply: with_metric(reply, "router-loss", 0.5),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_missing_and_what_nobody_asked_for_is_of_its_client_alone(kind: str, tmp_path: Path) -> None:
    found, lines = play(GROUPS[kind], tmp_path, control=True)
    assert is_left_out_alone(found, lines)


def test_a_control_variate_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    found, lines = play(with_more(CONTROL, LAYER), tmp_path)
    assert is_left_out_alone(found, lines)


MEASURED = ("client", "num-examples", "nats", "right", "sample-nats", "sample-tokens", "peak-memory")


def measure(name: str, value: Any, folder: Path) -> None:
    """Plays an evaluation in which client 1 says something else, and makes sure that it alone is left out."""

    def answer(request: Request) -> Answer:
        score = Score(20.0, 10, 5, {"token_accuracy": (3.0, 10.0)})
        reply = measured(request.client, score, Score(4.0, 2), peak_memory=20)
        return with_metric(reply, name, value) if request.client == 1 else reply

    parties, state = gather(answer, folder, metric="token_accuracy")
    found = evaluation.evaluate(parties, state, 1, {}, Attempt())
    (line,) = parties.emit.lines  # type: ignore[attr-defined]
    assert line.startswith("client 1 (bob)") and line.endswith("; it is left out") and len(line) < 250
    assert set(found.scores) == {0, 2} and found.total.loss == 2.0
    assert state.metrics["token_accuracy"]["after"] == pytest.approx(0.3)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", MEASURED)
def test_a_number_of_a_measurement_that_cannot_be_is_of_its_client_alone(name: str, kind: str, tmp_path: Path) -> None:
    measure(name, VALUES[kind], tmp_path)


@pytest.mark.parametrize("kind", VALUES)
def test_a_metric_that_cannot_be_is_of_its_client_alone(kind: str, tmp_path: Path) -> None:
    for value in (VALUES[kind], [VALUES[kind], 10.0], [3.0, VALUES[kind]], [VALUES[kind]]):
        if value not in ([-1, 10.0], [1, 2]):  # a sum may be negative
            measure("metric.token_accuracy", value, tmp_path)
    measure("metric.token_accuracy", [1.0, 1e-300], tmp_path)  # the mean would be infinite
    measure("metric.token_accuracy", [1.0, 0.0], tmp_path)


# -------------------- updates against those of the others


def test_the_norm_is_that_of_all_changes_as_one_vector() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[1e30]])}
    assert quarantine.change_norm((one, {"a": torch.zeros(2), "b": torch.tensor([[1e30]])})) == 3.0
    assert (
        quarantine.change_norm((one, {"a": torch.zeros(2)}), ({"a": torch.tensor(4.0)}, {"a": torch.tensor(0.0)})) == 5
    )


def test_the_median_tells_who_is_too_far_from_the_others() -> None:
    assert quarantine.too_large({0: 1.0, 1: 1.0, 2: 50.0, 3: 1.2, 4: 60.0}, 3.0).keys() == {2, 4}
    assert quarantine.too_large({0: 1.0, 1: 3.0, 2: 1.0}, 3.0) == {}  # the bound itself is allowed
    assert quarantine.too_large({0: 1.0, 1: 99.0}, 3.0) == {}  # of two, either may be wrong
    assert quarantine.too_large({0: 1.0, 1: 1.0, 2: 99.0}, 0.0) == {}
    assert quarantine.too_large({0: 0.0, 1: 0.0, 2: 1e-9}, 3.0).keys() == {2}


def larger(times: float) -> Callable[[Reply], Reply]:
    return lambda reply: with_tensor(reply, ADAPTERS, lambda tensor: tensor + times)


def test_an_update_much_larger_than_the_others_is_left_out_where_a_bound_is_set(tmp_path: Path) -> None:
    """Off by default; small enough an update passes."""
    assert len(play(larger(5.0), tmp_path / "off")[0].updates) == 3
    assert len(play(larger(0.1), tmp_path / "small", max_update_norm=3.0)[0].updates) == 3
    found, lines = play(larger(5.0), tmp_path / "on", max_update_norm=3.0)
    assert is_left_out_alone(found, lines)
    assert lines[0].startswith("client 1 (bob) sent an update with a norm of 12.")
    assert ", more than 3 times the median of the round, 0.529; it is left out" in lines[0]
    assert found.tokens == 200


@pytest.mark.parametrize("value", [-1, 0.5, math.nan, math.inf])
def test_the_bound_is_nothing_or_a_multiple_of_one_or_more(value: float) -> None:
    with pytest.raises(SettingError, match=r"max_update_norm: .* allowed: 0, or a number of at least 1"):
        gather(lambda request: Reply(0), Path(), max_update_norm=value)


def stage_play(sends: set[int], folder: Path) -> tuple[list[int], list[str]]:
    """Plays a round under a strategy with a stage, in which some clients send tensors of it."""

    def answer(request: Request) -> Answer:
        return honest(request.client, state.ledger.start, control=request.client in sends)

    parties, state = gather(answer, folder)
    parties = replace(parties, briefing=replace(parties.briefing, stage=True))
    assigned = {client: Assignment(state.ledger.start) for client in range(3)}
    found = training.train(parties, state, 1, assigned, Attempt())
    return [update.client for update in found.updates], parties.emit.lines  # type: ignore[attr-defined]


def test_tensors_of_a_stage_come_from_all_or_from_none(tmp_path: Path) -> None:
    """A strategy that sums them would end the run of all."""
    assert stage_play({0, 1, 2}, tmp_path) == ([0, 1, 2], [])
    assert stage_play(set(), tmp_path) == ([0, 1, 2], [])
    used, (line,) = stage_play({0, 2}, tmp_path)
    assert used == [0, 2]
    assert line == "client 1 (bob) sent no tensors of the strategy's stage, which the others sent; it is left out"
    used, (line,) = stage_play({1}, tmp_path)
    assert used == [0, 2] and "sent tensors of the strategy's stage, which the others did not send" in line


def test_who_did_not_train_its_copy_of_the_trunk_is_left_out(tmp_path: Path) -> None:
    """A strategy that counts on the trunk's share of its control variate would end the run of all."""

    def answer(request: Request) -> Answer:
        return honest(request.client, state.ledger.given(Assignment(state.ledger.start)))

    parties, state = gather(answer, tmp_path, trunk__schedule="copies")
    parties = replace(parties, workloads=[replace(WORK, steps=2)] * 3)
    made = {0: 2, 1: 0, 2: 2}
    parties.trunk.assign = lambda starts: None  # type: ignore[method-assign]
    parties.trunk.copies = lambda clients: {  # type: ignore[method-assign]
        client: Copy(Adapters({}, {}), {}, steps=made[client]) for client in clients
    }
    assigned = {client: Assignment(state.ledger.start) for client in range(3)}
    found = training.train(parties, state, 1, assigned, Attempt())
    assert is_left_out_alone(found, parties.emit.lines)  # type: ignore[attr-defined]
    assert parties.trunk.left == [1]  # type: ignore[attr-defined]
    assert "trained its copy of the trunk for 0 steps, not 2" in parties.emit.lines[0]  # type: ignore[attr-defined]


def test_the_norm_of_an_update_has_the_copy_of_the_trunk_in_it(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        return honest(request.client, state.ledger.given(Assignment(state.ledger.start)))

    parties, state = gather(answer, tmp_path, trunk__schedule="copies", max_update_norm=3.0)
    trunk = {"t.lora_A.weight": torch.ones(2, 3), "t.lora_B.weight": torch.zeros(4, 2)}
    parties.trunk.assign = lambda starts: None  # type: ignore[method-assign]
    parties.trunk.copies = lambda clients: {  # type: ignore[method-assign]
        client: Copy(Adapters({name: t + (5.0 if client == 1 else 0.1) for name, t in trunk.items()}, {}), {})
        for client in clients
    }
    found = training.train(parties, state, 1, dict.fromkeys(range(3), Assignment(state.ledger.start)), Attempt())
    assert is_left_out_alone(found, parties.emit.lines)  # type: ignore[attr-defined]


# -------------------- the run as if the client had just failed

STEPS = 3
SCHEDULES: dict[str, dict[str, Any]] = {
    "copies": {},
    "shared": {"deterministic": True},
    "accumulate": {"trunk.every": 2},
    "batched": {"deterministic": True},
    "frozen": {},
}
POINTS = ("hidden states 0", "gradient 0", "gradient 1", "update", "size")
"""What client 1 spoils in round 1, and at which step; the last is an update that is finite and too large."""

OUT_OF_LUCK = "out of luck"


def spoil_at(point: str, fails: bool, patch: pytest.MonkeyPatch) -> Callable[[Request, Answer], Answer]:
    """Has client 1 send NaN at one point of round 1, or fail there; returns what spoils its update."""
    what, _, step = point.rpartition(" ")

    def is_here(key: StepKey) -> bool:
        return (key.round, key.client, key.step) == (1, 1, int(step))

    def spoilt(tensor: Tensor) -> Tensor:
        if fails:
            raise RuntimeError(OUT_OF_LUCK)
        return tensor * math.nan

    send, send_back = Link.send, PendingStep.send_back

    def send_spoilt(self: Link, hidden: Tensor, key: StepKey, *args: Any, **how: Any) -> PendingStep:
        hits = what == "hidden states" and how.get("training", True) and is_here(key)
        return send(self, spoilt(hidden) if hits else hidden, key, *args, **how)

    def send_back_spoilt(self: PendingStep, gradient: Tensor | None) -> None:
        if what == "gradient" and gradient is not None and is_here(self._packet.key):
            gradient = spoilt(gradient)
        send_back(self, gradient)

    def spoil(request: Request, answer: Answer) -> Answer:
        if (
            point not in ("update", "size")
            or not isinstance(request, Train)
            or (request.round, request.client) != (1, 1)
        ):
            return answer
        if fails:
            return Failure(1, "RuntimeError", OUT_OF_LUCK)
        assert isinstance(answer, Reply)
        return with_all(answer, lambda tensor: tensor + (5.0 if point == "size" else math.nan))

    patch.setattr(Link, "send", send_spoilt)
    patch.setattr(PendingStep, "send_back", send_back_spoilt)
    return spoil


def with_all(reply: Reply, change: Callable[[Tensor], Tensor]) -> Reply:
    changed = {name: change(tensor) for name, tensor in reply.tensors[ADAPTERS].items()}
    return replace(reply, tensors={**reply.tensors, ADAPTERS: changed})


def numbers_of(out: Path) -> dict[str, Any]:
    """Returns the tensors of every checkpoint and of the result, and what the rounds measured."""
    tensors = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors") if "clients" not in p.parts}
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [without_times(event) for event in events if event["event"] in ("train", "evaluate", "aggregate")]
    for event in measured:
        for name in ("trunk", "bytes", "adapter_bytes"):  # what was computed in vain
            event.pop(name, None)
    assert measured and any("checkpoints" in name for name in tensors)
    return {**tensors, "events": measured}


def cases() -> Iterator[Any]:
    """Yields schedules and strategies; those of which the others are variations are fast tests."""
    for schedule in SCHEDULES:
        for strategy in ("fedavg", "scaffold"):
            is_fast = strategy == "fedavg" and schedule in ("copies", "shared")
            yield pytest.param(schedule, strategy, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("schedule", "strategy"), cases())
def test_a_client_that_sends_nan_leaves_the_run_as_one_that_fails(
    schedule: str, strategy: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """To the bit, wherever it sends it: adapters, moments, trunk, losses, of both rounds."""
    case = "control" if strategy == "scaffold" else "shared"
    settings: dict[str, Any] = {"clients": 3, "train.steps": STEPS, "trunk.schedule": schedule, **SCHEDULES[schedule]}
    settings["max_update_norm"] = 3.0
    config, _ = config_of(case, tiny_models["gpt2"], corpus_file, **settings)
    plain = {}
    for point in POINTS:
        found = {}
        for fails in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                spoil = spoil_at(point, fails, patch)
                out = tmp_path / f"{point}-{fails}"
                _, strategy_object = config_of(case, tiny_models["gpt2"], corpus_file, **settings)
                _, lines = federate(config, out, strategy_object, patch, spoil)
            failed = [event for event in lines.events if isinstance(event, ClientFailed)]
            assert [(event.client, event.round, event.phase) for event in failed] == [(1, 1, "training")]
            assert (OUT_OF_LUCK in failed[0].reason) == fails
            found[fails] = numbers_of(out)
        assert found[True].keys() == found[False].keys()
        different = [name for name, content in found[True].items() if content != found[False][name]]
        assert not different, f"{point}: {different}"
        plain[point] = found[True]["events"]
    # Elsewhere the trunk has learnt from the steps that the client made before.
    assert plain["hidden states 0"] != plain["update"] or schedule in ("copies", "frozen")
