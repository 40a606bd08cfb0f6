"""Objectives that compare with the base model, against the unsplit model under PEFT with its adapter disabled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_client import make_client, padded_rows, unsplit
from test_prompts import TOKENS, plain_peft
from torch import Tensor
from torch.nn import functional

from fedsplit.adaptation import lora
from fedsplit.adaptation.run_adapters import adapt
from fedsplit.client.client import Client
from fedsplit.client.further_arguments import PendingReference, aligned_mask
from fedsplit.client.heldout import held_out_batches, through_split
from fedsplit.client.link import Link
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch
from fedsplit.metrics.metric import load_metrics
from fedsplit.model.kernels import IGNORED
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.objectives.distillation import Distillation
from fedsplit.objectives.objective import demands_of
from fedsplit.seeds import derive_seed
from fedsplit.settings.documents import build
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import StepKey


def noisy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter that changes what the model says: a new one has factors B of zeros."""
    changed = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
        changed[name] = tensor + 0.05 * noise
    return changed


def aligned(model: Any, rows: Sequences) -> Tensor:
    return model(input_ids=rows.ids, attention_mask=rows.mask).logits[:, :-1].float()


def unsplit_loss(whole: Any, rows: Sequences, objective: Callable[..., Tensor]) -> Tensor:
    """The loss of an objective that asks for the base model, as a user of PEFT computes it."""
    with torch.no_grad(), whole.disable_adapter():
        base = aligned(whole, rows)
    return objective(aligned(whole, rows), rows.labels[:, 1:], base)


class Split:
    """Some steps of SGD through the split.

    Attributes:
        start: Adapters of all parts at the start.
        federated: Adapters of all parts at the end.
        moved: Change of each tensor, divided by the rate: after one step, the gradient.
    """

    def __init__(
        self,
        path: Path,
        objective: Callable[..., Tensor],
        rows: Sequences,
        steps: int,
        micro_batches: int = 1,
        accumulation: int = 1,
        batch_size: int = 4,
        kernels: str = "library",
        cut: tuple[int, int] = (1, 2),
    ) -> None:
        self.rate = 1.0 if steps == 1 else 0.1
        train = {"optimizer": "sgd", "lr": self.rate, "accumulation": accumulation, "batch_size": batch_size}
        client, server, given = make_client(
            path, "shared", cut, steps=steps, micro_batches=micro_batches, kernels=kernels, train=train
        )
        self.client = replace(client, shard=Shard("ann", rows, rows), objective=objective)
        self.start = noisy({**given, **server.adapters.read().tensors})
        server.adapters.write({name: self.start[name] for name in server.adapters.read().tensors})
        self.update = self.client.train({name: self.start[name] for name in given}, round=1)
        self.federated = {**self.update.adapters.tensors, **server.adapters.read().tensors}
        self.moved = {name: (self.start[name] - self.federated[name]) / self.rate for name in self.start}

    def batch(self, step: int) -> Sequences:
        """The sequences of a step."""
        return self.client._train[self.client._chosen(1, step)]


def both(
    path: Path, objective: Callable[..., Tensor], rows: Sequences, steps: int, *how: Any, **more: Any
) -> tuple[Split, float, dict[str, Tensor]]:
    """Some steps of SGD through the split and on the unsplit model: the split, the other's mean loss and adapters."""
    split = Split(path, objective, rows, steps, *how, **more)
    whole, trained = unsplit(path, split.start)
    optimizer = torch.optim.SGD(trained.values(), lr=split.rate)
    losses, weights = [], []
    for step in range(steps):
        chosen = split.batch(step)
        loss = unsplit_loss(whole, chosen, objective)
        loss.backward()
        losses.append(float(loss.detach()))
        weights.append(demands_of(objective).weight(chosen.labels))
        optimizer.step()
        optimizer.zero_grad()
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return split, mean, {name: parameter.detach() for name, parameter in trained.items()}


def batch_of(rows: Sequences, step: int, size: int, client: Any) -> Sequences:
    return batch(rows, step, size, derive_seed(0, "client", client.number))


@pytest.mark.parametrize(("micro_batches", "accumulation"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("kernels", ["library", "fused"])
def test_distillation_is_that_of_the_unsplit_model(
    model_path: Path, micro_batches: int, accumulation: int, kernels: str
) -> None:
    """Loss and gradients of one step, on padded rows of which some places only are predicted."""
    objective = Distillation(0.7, temperature=2.0)
    rows = padded_rows("completions")
    split, loss, adapters = both(
        model_path, objective, rows, 1, micro_batches, accumulation, batch_size=4 // accumulation, kernels=kernels
    )
    assert split.update.loss == pytest.approx(loss, rel=1e-6)
    gradients = {name: split.start[name] - adapter for name, adapter in adapters.items()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-2
    for name, gradient in gradients.items():
        assert (split.moved[name] - gradient).abs().max() <= 1e-6 * max(1.0, largest), name


@pytest.mark.parametrize("cut", [(0, 1), (0, 3), (1, 2), (2, 3)])
def test_some_steps_of_distillation_are_those_of_the_unsplit_model(tiny_models: dict[str, Path], cut) -> None:
    split, loss, adapters = both(tiny_models["llama"], Distillation(0.5), padded_rows("texts"), steps=4, cut=cut)
    assert split.update.loss == pytest.approx(loss, rel=1e-6)
    for name, adapter in adapters.items():
        assert (split.federated[name] - adapter).abs().max() <= 1e-6, name
        assert (split.start[name] - adapter).abs().max() > 1e-4, name


def test_the_reference_has_neither_adapter_nor_dropout_under_any_schedule(tiny_models: dict[str, Path]) -> None:
    """Adapters and the model itself have dropout, and the trunk trains: the reference stays the base model's."""
    path = tiny_models["gpt2"]
    for schedule in SCHEDULES:
        client, server, given = make_client(path, schedule, dropout=0.5, steps=2, train={"batch_size": 4})
        for part in (client.bottom, server.part, client.top):
            for module in part.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.5
        rows = padded_rows("texts")
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def watch(logits: Tensor, labels: Tensor, mask: Tensor, reference: Tensor, seen=seen) -> Tensor:
            seen.append((reference, labels, mask))
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

        client = replace(client, shard=Shard("ann", rows, rows), objective=watch)
        client.train(noisy(given), round=1)
        assert client.bottom.training and client.top.training
        base = load_unsplit(path)
        for step, (reference, labels, mask) in enumerate(seen):
            chosen = batch_of(rows, step, 4, client)
            assert not reference.requires_grad
            assert torch.equal(labels, chosen.labels[:, 1:])
            assert torch.equal(mask, labels != IGNORED)  # of texts all is predicted but padding
            expected = aligned(base, chosen)
            assert (reference - expected)[mask].abs().max() < 1e-5, schedule
        crossed = server.traffic.document()
        assert len(seen) == 2
        assert crossed["reference_up"] == crossed["activation_up"]
        assert "evaluation_activation_up" not in crossed


def test_the_reference_doubles_the_forwards_and_adds_no_gradient(tiny_models: dict[str, Path]) -> None:
    counts = []
    for objective in (None, Distillation()):
        client, server, given = make_client(tiny_models["llama"], "shared", steps=3)
        replace(client, objective=objective).train(given, round=1)
        counts.append(server.traffic.document())
    plain, compared = counts
    assert compared == plain | {f"reference_{way}": plain[f"activation_{way}"] for way in ("up", "down")}


@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_behind_virtual_tokens_the_reference_stands_where_the_text_is(tiny_models: dict[str, Path], kind: str) -> None:
    """The base model has no virtual tokens, and predicts the first token of a text from nothing."""
    path = tiny_models["llama"]
    config = build({"model": str(path), "cut": "1:2", "prompt.kind": kind, "prompt.tokens": 3, "train.max_length": 16})
    bottom, top = load_parts(path, (1, 2), ["bottom", "top"])
    for part in (bottom, top):
        adapt(part, config)
    rows = padded_rows("texts")[list(range(4))]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        seen.append((logits.detach(), labels, reference))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    link = Link(LocalTrunk(config), make_codec("raw"), SCHEDULES["shared"], incarnation="first")
    client = Client(0, Shard("ann", rows, rows), bottom, top, link, config.train, 0, objective=watch)
    virtual = config.prompt.virtual
    client.step(rows.ids, StepKey(1, 0, 0), rows.mask, rows.labels)
    ((logits, labels, reference),) = seen
    assert logits.shape == reference.shape == (4, virtual + rows.ids.shape[1] - 1, logits.shape[-1])
    assert bool((labels[:, :virtual] == IGNORED).all())
    assert torch.equal(labels[:, virtual:], rows.labels[:, 1:])
    expected = aligned(load_unsplit(path), rows)
    predicted = labels[:, virtual:] != IGNORED
    assert (reference[:, virtual:] - expected)[predicted].abs().max() < 1e-5
    assert not torch.allclose(logits[:, virtual:][predicted], expected[predicted], atol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_distillation_trains_virtual_tokens_and_prefixes_as_peft_does(tiny_models: dict[str, Path], kind: str) -> None:
    """Under a frozen trunk the gradients of bottom and top are at hand. The first token of a text is not predicted."""
    path = tiny_models["llama"]
    settings = {"prompt.kind": kind, "prompt.tokens": TOKENS} | ({"prompt.hidden": 20} if kind == "ptuning" else {})
    config = build({"model": str(path), "cut": "1:2", "kernels": "library", "train.max_length": 16, **settings})
    bottom, top = load_parts(path, (1, 2), ["bottom", "top"], kernels="library")
    for part in (bottom, top):
        adapt(part, config)
    trunk = LocalTrunk(config)
    given = lora.read(bottom, trunk.server.part, top).tensors
    rows = padded_rows("texts")[list(range(4))]
    link = Link(trunk, make_codec("raw"), SCHEDULES["shared"], incarnation="first")
    objective = Distillation(0.6, temperature=1.5)
    client = Client(0, Shard("ann", rows, rows), bottom, top, link, config.train, 0, objective=objective)
    loss = client.step(rows.ids, StepKey(1, 0, 0), rows.mask, rows.labels)

    whole, gradients = plain_peft(path, kind, given)
    logits = whole(input_ids=rows.ids, attention_mask=rows.mask).logits[:, -rows.ids.shape[1] : -1]
    with torch.no_grad(), whole.disable_adapter():
        base = aligned(whole, rows)
    expected = objective(logits, rows.labels[:, 1:], base)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    by_name = gradients()
    for name, parameter in client.adapter().items():
        assert parameter.grad is not None and by_name[name].abs().max() > 1e-3
        assert (parameter.grad - by_name[name]).abs().max() <= 1e-6 * max(1.0, float(by_name[name].abs().max())), name


def test_a_metric_may_ask_for_the_base_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Of held-out text, the reference is the base model's, whatever adapter is measured."""
    (tmp_path / "mine.py").write_text(
        "def distance(logits, labels, reference, mask):\n"
        "    apart = (logits - reference).abs().amax(-1)\n"
        "    return float(apart[mask].sum()), int(mask.sum())\n"
    )
    client, server, given = make_client(tiny_models["llama"], "frozen")
    rows = padded_rows("texts")
    client = replace(client, shard=Shard("ann", rows, rows))
    metrics = load_metrics([f"{tmp_path}/mine.py:distance"], {})
    batches = held_out_batches(client.shard, 100, 3)
    totals = []
    for adapter in (given, noisy(given)):
        scores = through_split(client, adapter, 0, batches, metrics)
        totals.append(sum(score.metrics["distance"][0] for score in scores))
        assert sum(score.metrics["distance"][1] for score in scores) == rows.predicted
    assert totals[0] < 1e-3 * totals[1]
    assert server.traffic.reference.up == server.traffic.evaluation_activation.up


def test_masks_are_aligned_with_labels() -> None:
    labels = torch.tensor([[5, 6, 7], [5, IGNORED, IGNORED]])
    assert aligned_mask(labels, None).tolist() == [[True, True], [True, True]]
    assert aligned_mask(labels, torch.tensor([[1, 1, 1], [1, 0, 0]])).tolist() == [[True, True], [False, False]]
    assert aligned_mask(torch.tensor([3, 1]), torch.ones(2, 5)).tolist() == [True, True]


def test_rows_cross_before_anything_is_waited_for(tiny_models: dict[str, Path]) -> None:
    client, server, _ = make_client(tiny_models["llama"], "shared")
    rows = padded_rows("equal")[list(range(3))]
    pending = PendingReference(client.bottom, client.link, rows.ids, rows.mask, StepKey(1, 0, 0))
    assert server.traffic.reference.up == 0  # a trunk in this process computes when its answer is waited for
    assert pending.logits(client.top).shape[:2] == (3, 7)
    assert server.traffic.reference.up == 3 * 8 * 32 * 4
