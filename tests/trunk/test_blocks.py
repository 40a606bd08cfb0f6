"""The trunk's blocks with snapshots of their adapter: plain autograd on the part is what they must equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import without_dropout

from fedsplit.adaptation import lora
from fedsplit.model.parts import Trunk
from fedsplit.model.split import load_parts
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.pending import PendingBatch
from fedsplit.trunk.registry import AdapterRegistry
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.trainable import TrainableAdapter
from fedsplit.wire.packets import StepKey


def trunk_of(path: Path, dropout: float = 0.0, rank: int = 2, salt: int = 0) -> Trunk:
    (part,) = load_parts(path, (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(rank,), dropout=dropout), seed=0)
    without_dropout(part)
    for number, parameter in enumerate(lora.parameters(part).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(salt + number)) * 0.2
    trunk: Trunk = part
    return trunk


def adapter_of(part: Trunk) -> TrainableAdapter:
    return AdapterRegistry(lora.read(part), SCHEDULES["shared"], TrainSettings(lr=0.1), RoundCounts()).shared


def batch_of(adapter: TrainableAdapter, seed: int = 0) -> PendingBatch:
    generator = torch.Generator().manual_seed(3)
    inputs = {
        StepKey(1, n, 0): torch.randn(2, length, 32, generator=generator).requires_grad_()
        for n, length in enumerate((5, 3))
    }
    return PendingBatch(inputs, {}, adapter, adapter.snapshot, seed)


def test_forward_and_backward_are_those_of_the_part(model_path: Path) -> None:
    part, plain = trunk_of(model_path), trunk_of(model_path)
    blocks, batch = Blocks(part), batch_of(adapter_of(part))
    sent = {key: torch.randn(hidden.shape) for key, hidden in batch.inputs.items()}
    output = blocks.run(batch, keeps_graph=True)
    of_adapter, of_inputs = blocks.differentiate(batch, output, sent, {})
    joined = batch.join()[0].detach().requires_grad_()
    expected = plain.train()(joined)
    assert torch.equal(output.hidden, expected)
    expected.backward(batch.spread(sent, expected))
    assert all(torch.equal(of_inputs[key], own) for key, own in batch.cut(joined.grad).items())
    for name, parameter in lora.parameters(plain).items():
        assert torch.equal(of_adapter[name], parameter.grad), name


def test_what_is_computed_again_is_the_same_whatever_was_placed_between(model_path: Path) -> None:
    """An older snapshot, dropout of its own, and the state of the generator is as it was."""
    part = trunk_of(model_path, dropout=0.5)
    blocks, adapter = Blocks(part), adapter_of(part)
    batch = batch_of(adapter, seed=11)
    first = blocks.run(batch, keeps_graph=False).hidden
    adapter.step({name: torch.ones_like(tensor) for name, tensor in batch.snapshot.items()})
    state = torch.get_rng_state()
    newer = blocks.run(batch_of(adapter, seed=11), keeps_graph=False).hidden
    blocks.inference(adapter.snapshot)
    assert not torch.equal(newer, first)
    assert torch.equal(blocks.run(batch, keeps_graph=False).hidden, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_version_of_another_rank_brings_its_scaling(model_path: Path) -> None:
    part, other = trunk_of(model_path), trunk_of(model_path, rank=1, salt=50)
    blocks, (hidden, _) = Blocks(part), batch_of(adapter_of(part)).join()
    with torch.no_grad():
        expected = other.eval()(hidden)
        assert torch.equal(blocks.inference(dict(lora.parameters(other)))(hidden), expected)


def test_weighing_a_step_leaves_nothing_behind(model_path: Path) -> None:
    part = trunk_of(model_path)
    blocks, adapter = Blocks(part), adapter_of(part)
    before = {name: tensor.clone() for name, tensor in adapter.snapshot.items()}
    graph, working = blocks.weigh(2, 8, adapter)
    assert 16 * 5 * 32 * 4 < graph < 16 * 200 * 32 * 4
    assert working >= graph
    twice, _ = blocks.weigh(4, 8, adapter)
    assert twice == pytest.approx(2 * graph, rel=0.2)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.snapshot.items())
    assert all(parameter.grad is None for parameter in part.parameters())


def test_an_adapter_without_influence_has_a_gradient_of_zeros(tiny_models: dict[str, Path]) -> None:
    """As that of an expert that no token has chosen."""
    part = trunk_of(tiny_models["llama"])
    part.decoder.layers[0].mlp.forward = torch.zeros_like
    blocks, batch = Blocks(part), batch_of(adapter_of(part))
    output = blocks.run(batch, keeps_graph=True)
    sent = {key: torch.ones(hidden.shape) for key, hidden in batch.inputs.items()}
    of_adapter, _ = blocks.differentiate(batch, output, sent, {})
    for name, gradient in of_adapter.items():
        assert bool(gradient.any()) == ("mlp" not in name), name
