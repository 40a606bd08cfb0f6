"""The trunk's blocks with versions of their adapter: plain autograd on the part is what they must equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import without_dropout

from fedsplit.adaptation import lora
from fedsplit.config import LoraSettings, TrainSettings
from fedsplit.model.parts import Trunk
from fedsplit.model.split import load_parts
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.flights import Flight
from fedsplit.trunk.learner import Learner
from fedsplit.trunk.learners import Learners
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.packets import StepKey


def trunk_of(path: Path, dropout: float = 0.0, rank: int = 2, salt: int = 0) -> Trunk:
    (part,) = load_parts(path, (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(rank,), dropout=dropout), seed=0)
    without_dropout(part)
    for number, parameter in enumerate(lora.parameters(part).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(salt + number)) * 0.2
    trunk: Trunk = part
    return trunk


def learner_of(part: Trunk) -> Learner:
    return Learners(lora.read(part), SCHEDULES["shared"], TrainSettings(lr=0.1), Counter()).shared


def flight_of(learner: Learner, seed: int = 0) -> Flight:
    generator = torch.Generator().manual_seed(3)
    inputs = {
        StepKey(1, n, 0): torch.randn(2, length, 32, generator=generator).requires_grad_()
        for n, length in enumerate((5, 3))
    }
    return Flight(inputs, {}, learner, learner.version, seed)


def test_forward_and_backward_are_those_of_the_part(model_path: Path) -> None:
    part, plain = trunk_of(model_path), trunk_of(model_path)
    blocks, flight = Blocks(part), flight_of(learner_of(part))
    sent = {key: torch.randn(hidden.shape) for key, hidden in flight.inputs.items()}
    output = blocks.run(flight, keeps_graph=True)
    of_adapter, of_inputs = blocks.differentiate(flight, output, sent, {})
    joined = flight.join()[0].detach().requires_grad_()
    expected = plain.train()(joined)
    assert torch.equal(output.hidden, expected)
    expected.backward(flight.spread(sent, expected))
    assert all(torch.equal(of_inputs[key], own) for key, own in flight.cut(joined.grad).items())
    for name, parameter in lora.parameters(plain).items():
        assert torch.equal(of_adapter[name], parameter.grad), name


def test_what_is_computed_again_is_the_same_whatever_was_placed_between(model_path: Path) -> None:
    """An older version, dropout of its own, and the state of the generator is as it was."""
    part = trunk_of(model_path, dropout=0.5)
    blocks, learner = Blocks(part), learner_of(part)
    flight = flight_of(learner, seed=11)
    first = blocks.run(flight, keeps_graph=False).hidden
    learner.step({name: torch.ones_like(tensor) for name, tensor in flight.version.items()})
    state = torch.get_rng_state()
    newer = blocks.run(flight_of(learner, seed=11), keeps_graph=False).hidden
    blocks.inference(learner.version)
    assert not torch.equal(newer, first)
    assert torch.equal(blocks.run(flight, keeps_graph=False).hidden, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_version_of_another_rank_brings_its_scaling(model_path: Path) -> None:
    part, other = trunk_of(model_path), trunk_of(model_path, rank=1, salt=50)
    blocks, (hidden, _) = Blocks(part), flight_of(learner_of(part)).join()
    with torch.no_grad():
        expected = other.eval()(hidden)
        assert torch.equal(blocks.inference(dict(lora.parameters(other)))(hidden), expected)


def test_weighing_a_step_leaves_nothing_behind(model_path: Path) -> None:
    part = trunk_of(model_path)
    blocks, learner = Blocks(part), learner_of(part)
    before = {name: tensor.clone() for name, tensor in learner.version.items()}
    graph, working = blocks.weigh(2, 8, learner)
    assert 16 * 5 * 32 * 4 < graph < 16 * 200 * 32 * 4
    assert working >= graph
    twice, _ = blocks.weigh(4, 8, learner)
    assert twice == pytest.approx(2 * graph, rel=0.2)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.version.items())
    assert all(parameter.grad is None for parameter in part.parameters())
