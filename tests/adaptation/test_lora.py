"""LoRA on a part: names, start, counts, files that PEFT opens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS

from fedsplit.adaptation import lora
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters

KINDS = ("bottom", "trunk", "top")
SETTINGS = LoraSettings(rank=(3,), alpha=6.0, dropout=0.0)


def adapted(path: Path, cut: tuple[int, int], settings: LoraSettings = SETTINGS, seed: int = 0):
    parts = load_parts(path, cut, KINDS)
    for part in parts:
        lora.add(part, settings, seed)
    return parts


def test_the_start_depends_on_seed_and_name_alone(any_model_path: Path) -> None:
    starts = [lora.read(*adapted(any_model_path, cut)).tensors for cut in ((1, 2), (0, 3))]
    torch.manual_seed(77)
    starts.append(lora.read(*adapted(any_model_path, (2, 3))).tensors)
    assert starts[0].keys() == starts[1].keys() == starts[2].keys()
    for name, tensor in starts[0].items():
        assert all(torch.equal(tensor, other[name]) for other in starts)
        assert bool(tensor.any()) == ("lora_A" in name)
    other = lora.read(*adapted(any_model_path, (1, 2), seed=1)).tensors
    assert not any(torch.equal(starts[0][name], other[name]) for name in other if "lora_A" in name)


@pytest.mark.parametrize("kernels", ["library", "fused"])
def test_adapters_are_float32_whatever_the_base_is(model_path: Path, kernels: str) -> None:
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = load_parts(model_path, (1, 2), KINDS, dtype, kernels)
        for part in parts:
            lora.add(part, SETTINGS, 0)
        starts.append(lora.read(*parts).tensors)
    assert {tensor.dtype for tensor in starts[1].values()} == {torch.float32}
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_layers_know_scaling_and_whether_they_are_transposed(tiny_models: dict[str, Path]) -> None:
    for family, transposed in (("gpt2", True), ("llama", False)):
        read = lora.read(*adapted(tiny_models[family], (1, 2)))
        assert {(read.scaling(name), layer.transposed) for name, layer in read.layers.items()} == {(2.0, transposed)}
        assert {f"{layer}.lora_{f}.weight" for layer in read.layers for f in "AB"} == set(read.tensors)
        assert all(a.shape[0] == b.shape[1] == 3 for a, b in map(read.factors, read.layers))


@pytest.mark.parametrize("training", [False, True])
def test_new_modules_are_in_the_parts_mode(model_path: Path, training: bool) -> None:
    """Or a part that is only looked at would drop, as long as nobody has said that it should not."""
    (trunk,) = load_parts(model_path, (1, 2), ["trunk"])
    lora.add(trunk.train(training), LoraSettings(dropout=0.5), 0)
    assert {module.training for module in trunk.modules()} == {training}


def test_write_then_read_is_identity_and_copies(model_path: Path) -> None:
    bottom, _, top = adapted(model_path, (1, 2))
    tensors = {name: torch.randn_like(t) for name, t in lora.read(bottom, top).tensors.items()}
    lora.write(tensors, bottom, top)
    read = lora.read(bottom, top).tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    next(iter(read.values())).add_(1)
    assert all(torch.equal(lora.read(bottom, top).tensors[name], tensor) for name, tensor in tensors.items())


def test_an_adapter_that_is_missing_is_named(model_path: Path) -> None:
    bottom, *_ = adapted(model_path, (1, 2))
    with pytest.raises(KeyError, match="lora_A"):
        lora.write({}, bottom)


def test_targets_can_be_chosen(tiny_models: dict[str, Path]) -> None:
    parts = adapted(tiny_models["llama"], (1, 2), LoraSettings(targets=("q_proj", "v_proj")))
    assert {name.rpartition(".")[2] for name in lora.read(*parts).layers} == {"q_proj", "v_proj"}


def test_a_part_without_blocks_has_no_adapter(model_path: Path) -> None:
    bottom, _, top = adapted(model_path, (0, BLOCKS))
    assert lora.read(bottom, top).tensors == {}
    assert lora.count(bottom)["trainable"] == 0


def test_counts_add_up_to_the_unsplit_model(any_model_path: Path) -> None:
    whole = load_unsplit(any_model_path).num_parameters()
    bottom, trunk, top = adapted(any_model_path, (1, 2))
    counts = [lora.count(bottom), lora.count(trunk), lora.count(top, elsewhere=[bottom])]
    trainable = sum(count["trainable"] for count in counts)
    assert trainable == sum(t.numel() for t in lora.read(bottom, trunk, top).tensors.values())
    assert sum(count["total"] for count in counts) == whole + trainable


def test_a_finished_adapter_brings_its_ranks_and_scalings(model_path: Path) -> None:
    """Layer by layer, as a file has them that something was folded into."""
    torch.manual_seed(4)
    parts = adapted(model_path, (1, 2))
    whole = lora.read(*parts)
    layers = sorted(whole.layers)
    given = {}
    for rank, layer in enumerate(layers, 1):
        a, b = whole.factors(layer)
        given[f"{layer}.lora_A.weight"] = torch.randn(rank, a.shape[1]) * 0.1
        given[f"{layer}.lora_B.weight"] = torch.randn(b.shape[0], rank) * 0.1
    changed = {layer: replace(whole.layers[layer], alpha=0.5 * n) for n, layer in enumerate(layers, 1)}
    lora.adopt(Adapters(given, changed), *parts)
    found = lora.read(*parts)
    assert found.layers == changed and all(torch.equal(found.tensors[name], given[name]) for name in given)
    bottom, trunk, top = parts
    ids = torch.arange(12).reshape(2, 6)
    mine = top.logits(trunk(bottom(ids)))
    merged = load_unsplit(model_path)
    modules = dict(merged.named_modules())
    for layer in layers:
        change = (found.change(layer).up @ found.change(layer).down).float()
        weight = modules[layer].weight.data
        weight += change.T if found.layers[layer].transposed else change
    torch.testing.assert_close(mine, merged(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(KeyError):
        lora.adopt(Adapters({}, {}), bottom)
