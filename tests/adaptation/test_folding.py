"""Changes that are added to base weights, and taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.adaptation import folding, lora
from fedsplit.lowrank import LowRank
from fedsplit.model.head import HEAD
from fedsplit.model.split import load_parts
from fedsplit.settings.sections import LoraSettings


@pytest.fixture
def trunk(model_path: Path):
    (part,) = load_parts(model_path, (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(2,)), seed=0)
    return part


def test_a_change_is_added_and_taken_back_to_the_bit(trunk) -> None:
    """GPT-2 stores a weight as (in, out), Llama as (out, in)."""
    layer, facts = next(iter(lora.layers_of(trunk).items()))
    before = folding.base_weights(trunk, [layer])
    outputs, inputs = before[layer].T.shape if facts.transposed else before[layer].shape
    change = LowRank(torch.randn(outputs, 2), torch.randn(2, inputs))
    folding.fold(trunk, {layer: change, "layer of another part": change})
    dense = change.up @ change.down
    added = folding.base_weights(trunk, [layer])[layer] - before[layer]
    torch.testing.assert_close(added, dense.T if facts.transposed else dense, rtol=1e-4, atol=1e-5)
    folding.put_back(trunk, before)
    assert torch.equal(folding.base_weights(trunk, [layer])[layer], before[layer])


def test_weights_of_other_parts_are_left_out(trunk) -> None:
    assert folding.base_weights(trunk, ["layer of another part"]) == {}


def test_an_embedding_that_is_tied_to_the_head_does_not_change(tiny_models: dict[str, Path]) -> None:
    bottom, top = load_parts(tiny_models["gpt2"], (1, 2), ["bottom", "top"])
    lora.add(top, LoraSettings(rank=(2,)), seed=0, head="lora")
    assert HEAD in lora.layers_of(top)
    shared = {parameter.data_ptr() for parameter in bottom.parameters()}
    assert top.get_submodule(HEAD).base_layer.weight.data_ptr() in shared
    embedding = {name: parameter.clone() for name, parameter in bottom.named_parameters()}

    weight = folding.base_weights(top, [HEAD])[HEAD]
    folding.fold(top, {HEAD: LowRank(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]))})
    assert torch.equal(folding.base_weights(top, [HEAD])[HEAD], weight + 1)
    assert all(torch.equal(parameter, embedding[name]) for name, parameter in bottom.named_parameters())
