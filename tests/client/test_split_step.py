"""A step through all three parts, and gradients at a second adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import without_dropout
from test_client import make_client, padded_rows, unsplit
from torch.nn import functional

from fedsplit.adaptation import lora
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch
from fedsplit.model.kernels import IGNORED
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.objectives.label_smoothing import LabelSmoothing
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import LoraSettings
from fedsplit.stages import Gradients, GradientStage, LocalStep, LossTerm, RoundStart, Rows
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.casting import Cast, array_as
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import StepKey


def test_a_step_is_the_unsplit_models_to_the_bit(model_path: Path) -> None:
    client, _, _ = make_client(model_path, "frozen", train={"batch_size": 10})
    client.bottom.eval(), client.top.eval()
    for number, kind in enumerate(("completions", "texts", "equal")):
        rows = padded_rows(kind)
        loss = client.step(rows.ids, StepKey(1, 0, number), rows.mask, rows.labels)
        whole = load_unsplit(model_path)(input_ids=rows.ids, attention_mask=rows.mask, labels=rows.labels)
        assert torch.equal(loss, whole.loss.detach()), kind


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """An objective that is not torch's: (1 - p)^2 times the cross-entropy (1708.02002)."""
    losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return ((1 - (-losses).exp()).square() * losses)[labels.flatten() != IGNORED].mean()


@pytest.mark.parametrize("kernels", ["library", "fused"])
@pytest.mark.parametrize(("micro_batches", "accumulation"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("objective", [LabelSmoothing(0.2), focal])
def test_an_objective_is_that_of_the_unsplit_model(
    model_path: Path, objective, micro_batches: int, accumulation: int, kernels: str
) -> None:
    """One step of SGD at rate 1 shows the gradients of all three parts; rows are padded, and predict unequally much."""
    train = {"optimizer": "sgd", "lr": 1.0, "accumulation": accumulation}
    client, server, given = make_client(
        model_path, "shared", steps=1, micro_batches=micro_batches, kernels=kernels, train=train
    )
    rows = padded_rows("completions")
    client = replace(client, shard=Shard("ann", rows, rows), objective=objective)
    start = {**given, **server.adapters.read().tensors}
    update = client.train(given, round=1)
    federated = {**update.adapters.tensors, **server.adapters.read().tensors}

    whole, trained = unsplit(model_path, start)
    chosen = batch(rows, 0, 3 * accumulation, derive_seed(0, "client", 0))
    assert chosen.mask is not None
    logits = whole(input_ids=chosen.ids, attention_mask=chosen.mask).logits
    loss = objective(logits[:, :-1].float(), chosen.labels[:, 1:])
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in trained.items()}
    if (micro_batches, accumulation, kernels) == (1, 1, "library"):
        assert update.loss == float(loss.detach())  # to the bit
    assert update.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(start[name] - federated[name], gradient, atol=2e-6, rtol=1e-3), name

    whole.zero_grad()
    whole(input_ids=chosen.ids, attention_mask=chosen.mask, labels=chosen.labels).loss.backward()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    apart = max(float((trained[name].grad - gradient).abs().max()) for name, gradient in expected.items())
    assert apart > 0.03 * largest > 1e-4, "as for cross-entropy: the test would prove nothing"


def test_classes_have_an_objective_too(model_path: Path) -> None:
    client, _, _ = make_client(model_path, "frozen")
    bottom, top = load_parts(model_path, (1, 2), ["bottom", "top"], classes=4)
    for part in (bottom, top):
        lora.add(part, LoraSettings(rank=(2,), dropout=0.0), 0)
        without_dropout(part)
    client = replace(client, bottom=bottom.eval(), top=top.eval(), objective=LabelSmoothing(0.2))
    ids, labels = client.shard.train.ids[:3], torch.tensor([0, 3, 1])
    loss = client.step(ids, StepKey(1, 0, 0), labels=labels)
    hidden = client.link.evaluate(bottom(ids), StepKey(1, 0, 1))
    with torch.no_grad():
        expected = functional.cross_entropy(top.scores(hidden), labels, label_smoothing=0.2)
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_micro_batches_of_classes_are_the_whole_batch(model_path: Path) -> None:
    losses, heads = [], []
    for count in (1, 3):
        client, _, _ = make_client(model_path, "frozen", micro_batches=count, train={"batch_size": 5})
        bottom, top = load_parts(model_path, (1, 2), ["bottom", "top"], classes=4)
        for part in (bottom, top):
            lora.add(part, LoraSettings(rank=(2,), dropout=0.0), 0)
            without_dropout(part)
        client = replace(client, bottom=bottom, top=top)
        ids, lengths = padded_rows("texts").ids, padded_rows("texts").lengths
        rows = Sequences(ids, torch.arange(10) % 4, lengths)[list(range(5))]
        losses.append(float(client.step(rows.ids, StepKey(1, 0, 0), rows.mask, rows.labels)))
        heads.append(top.score.weight.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.allclose(heads[0], heads[1], atol=1e-6)


@pytest.mark.parametrize("kernels", ["library", "fused"])
@pytest.mark.parametrize("schedule", ["shared", "batched"])
def test_nobody_writes_to_what_came_over_the_wire(
    model_path: Path, schedule: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lie in memory that others read, or that cannot be written to at all."""
    arrived: list[tuple[Encoded, bytes]] = []
    decode = Cast.decode

    def watched(self, encoded, role):
        values = encoded.array("values")
        sealed = array_as(np.frombuffer(values.tobytes(), values.dtype).reshape(values.shape), encoded.dtype)
        arrived.append((sealed, values.tobytes()))
        return decode(self, sealed, role)

    monkeypatch.setattr(Cast, "decode", watched)
    client, _, given = make_client(model_path, schedule, dropout=0.1, steps=2, kernels=kernels)
    client.train(given, 1)
    assert len(arrived) == 8
    assert all(sealed.array("values").tobytes() == before for sealed, before in arrived)


class Elsewhere(GradientStage):
    """Asks in every step for the gradients at the very same adapter, and at one without a change of the weights."""

    def begin(self, start: RoundStart) -> None:
        self.same: list[bool] = []
        self.other: list[bool] = []

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        assert step.gradient_at is not None
        before = {name: parameter.detach().clone() for name, parameter in step.parameters.items()}
        here = step.gradient_at(step.parameters)
        there = step.gradient_at({name: torch.zeros_like(tensor) for name, tensor in before.items()})
        self.same += [torch.allclose(here[name], gradient, atol=1e-7) for name, gradient in gradients.items()]
        self.other += [torch.equal(there[name], gradient) for name, gradient in gradients.items() if gradient.any()]
        assert all(torch.equal(step.parameters[name], tensor) for name, tensor in before.items())
        return gradients


def test_a_stage_may_ask_for_gradients_elsewhere_and_changes_nothing_by_it(tiny_models: dict[str, Path]) -> None:
    """With a frozen trunk they are the step's own at the step's adapter. What the trunk learns stays the same, too."""
    results = []
    for stage in (None, Elsewhere()):
        client, server, given = make_client(tiny_models["llama"], "shared", steps=3, micro_batches=2)
        update = client.train(given, 1, stage=stage)
        results.append({**update.adapters.tensors, **server.adapters.read().tensors})
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    stage = Elsewhere()
    client, server, given = make_client(tiny_models["llama"], "frozen", steps=2, train={"accumulation": 2})
    client.train(given, 1, stage=stage)
    assert stage.same and all(stage.same) and not any(stage.other)


@pytest.mark.parametrize("schedule", ["batched", "accumulate", "copies"])
def test_gradients_elsewhere_teach_the_trunk_nothing(tiny_models: dict[str, Path], schedule: str) -> None:
    results = []
    for stage in (None, Elsewhere()):
        client, server, given = make_client(tiny_models["llama"], schedule, steps=3, train={"accumulation": 2})
        update = client.train(given, 1, stage=stage)
        server.leave(0)
        server.end_round([0])
        of_trunk = [server.adapters.read(), *(copy.adapters for copy in server.adapters.copies().values())]
        results.append({**update.adapters.tensors, **of_trunk[-1].tensors})
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


class Watches(GradientStage):
    """Adds half the mean square of the states, and remembers how the rows' states at its start compare with them."""

    def begin(self, start: RoundStart) -> None:
        self.start = start.adapters
        self.equal: list[bool] = []

    def loss_term(self, rows: Rows) -> LossTerm:
        there = rows.states_at(self.start)
        assert not there.requires_grad
        other = rows.states_at({name: tensor + 0.1 for name, tensor in self.start.items()})
        assert not torch.allclose(there, other)

        def term(states: torch.Tensor) -> torch.Tensor:
            self.equal.append(torch.allclose(states, there, atol=1e-6))
            return states.square().mean() / 2

        return term


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "forward-only"])
def test_a_stages_term_of_the_loss_trains_all_three_parts(tiny_models: dict[str, Path], schedule: str) -> None:
    """The gradients of one step, with accumulation and micro-batches, are the unsplit model's."""
    rate = 0.25
    parts = 1 if schedule == "batched" else 2  # under which the trunk steps after each part
    train = {"accumulation": parts, "batch_size": 8 // parts, "optimizer": "sgd", "lr": rate}
    client, server, given = make_client(tiny_models["llama"], schedule, steps=1, micro_batches=parts, train=train)
    trunk = server.adapters.read().tensors
    stage = Watches()
    update = client.train(given, 1, stage=stage)
    assert stage.equal == [True] * parts**2
    server.leave(0)
    server.end_round([0])
    copies = server.adapters.copies()
    of_trunk = copies[0].adapters if copies else server.adapters.read()
    found = {**update.adapters.tensors, **of_trunk.tensors}

    whole, parameters = unsplit(tiny_models["llama"], {**given, **trunk})
    rows = batch(client.shard.train, 0, 8, derive_seed(0, "client", 0))
    out = whole(input_ids=rows.ids, labels=rows.labels, output_hidden_states=True)
    loss = out.loss + out.hidden_states[-1].square().mean() / 2
    loss.backward()
    assert update.loss == pytest.approx(loss.item(), rel=1e-5)
    moved = given if schedule == "frozen" else parameters
    for name, parameter in parameters.items():
        expected = parameter - rate * parameter.grad if name in moved else parameter
        assert torch.allclose(found[name], expected, atol=1e-6), name


def test_where_no_stage_has_a_term_no_further_step_crosses(tiny_models: dict[str, Path]) -> None:
    client, server, given = make_client(tiny_models["gpt2"], "shared", steps=2)
    client.train(given, 1, stage=GradientStage())
    assert server.traffic.evaluation_activation.up == 0
    client.train(given, 2, stage=Watches())
    assert server.traffic.evaluation_activation.up > 0


def test_a_model_in_training_stays_so_behind_states_elsewhere(tiny_models: dict[str, Path]) -> None:
    """Weights, gradients of the batch before, and dropout are as they were; an adapter of other names is refused."""
    seen = []

    class Looks(GradientStage):
        def begin(self, start: RoundStart) -> None:
            self.start = start.adapters

        def loss_term(self, rows: Rows) -> None:
            before = {n: (p.clone(), None if p.grad is None else p.grad.clone()) for n, p in client.adapter().items()}
            rows.states_at({name: tensor + 1 for name, tensor in self.start.items()})
            for name, parameter in client.adapter().items():
                weight, gradient = before[name]
                assert torch.equal(parameter, weight)
                assert gradient is None if parameter.grad is None else torch.equal(parameter.grad, gradient)
            seen.append(client.bottom.training and client.top.training)
            with pytest.raises(ValueError, match="missing or unknown"):
                rows.states_at({})

    client, _, given = make_client(tiny_models["gpt2"], "shared", steps=1, train={"accumulation": 2})
    client.train(given, 1, stage=Looks())
    assert seen == [True, True]
