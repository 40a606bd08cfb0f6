"""Sums of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft_adapters
import pytest
import torch
from measured_adapters import base_of, changes, logits
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsplit.adaptation import adapter_files
from fedsplit.errors import InputError
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.combining import combine
from fedsplit.results.finished import find_adapter
from fedsplit.results.merging import merge

CLASSES = {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_combined_adapters_are_the_dense_sum(
    how: str, rslora: bool, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """cat: the sum; svd: its best fit; linear: factor by factor, each scaled by the root of weight and scaling."""
    adapters = [find_adapter(finished_run("gpt2", seed=seed, lora__rslora=rslora)) for seed in (1, 2)]
    combine(adapters, [0.7, 0.3], how, tmp_path / "out")
    one, two = (changes(adapter.folder) for adapter in adapters)
    read = [adapter_files.load(adapter.folder) for adapter in adapters]
    for layer, found in changes(tmp_path / "out").items():
        expected = 0.7 * one[layer] + 0.3 * two[layer]
        if how == "svd":
            u, s, v = torch.linalg.svd(expected, full_matrices=False)
            expected = u[:, :2] * s[:2] @ v[:2]
        if how == "linear":
            roots = [(weight * own.scaling(layer)) ** 0.5 for weight, own in zip((0.7, 0.3), read, strict=True)]
            a, b = (sum(root * own.factors(layer)[f] for root, own in zip(roots, read, strict=True)) for f in (0, 1))
            expected = (b @ a).double()
        assert torch.allclose(found, expected, atol=1e-5), layer
    merge(find_adapter(tmp_path / "out"), tmp_path / "merged")
    opened = PeftModel.from_pretrained(base_of(adapters[0]), str(tmp_path / "out"))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(opened), atol=1e-5)


def test_adapters_of_different_ranks_are_combined_exactly(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """One with folded changes, of its own rank in every layer; a weight may be negative."""
    adapters = [find_adapter(finished_run("gpt2", strategy)) for strategy in ("fedex", "fedavg")]
    with pytest.raises(InputError, match=r"linear needs adapters of the same ranks.*: use cat or svd"):
        combine(adapters, [1.0, 1.0], "linear", tmp_path / "out")
    combine(adapters, [2.0, -1.0], "cat", tmp_path / "out")
    one, two = (changes(adapter.folder) for adapter in adapters)
    for layer, found in changes(tmp_path / "out").items():
        assert torch.allclose(found, 2.0 * one[layer] - two[layer], atol=1e-5), layer
    opened = PeftModel.from_pretrained(base_of(adapters[0]), str(tmp_path / "out"))
    both = adapter_files.load(tmp_path / "out")
    assert sum(p.numel() for n, p in opened.named_parameters() if "lora_" in n) == sum(
        tensor.numel() for tensor in both.tensors.values()
    )


def test_adapters_of_different_models_are_not_combined(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    adapters = [find_adapter(finished_run(family)) for family in ("gpt2", "llama")]
    with pytest.raises(InputError, match="belong to different base models"):
        combine(adapters, [0.5, 0.5], "cat", tmp_path / "out")


def test_adapters_of_different_layers_are_combined_whole(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT lays out a sum by what the first one chooses: blocks, modules without some, a pattern."""
    model, folders = tiny_models["llama"], []
    for seed, kind in enumerate(("some blocks", "without a module", "by a pattern")):
        folders.append(peft_adapters.make("llama", kind, model, tmp_path / kind, seed))
    adapters = [find_adapter(folder) for folder in folders]
    combine(adapters, [0.5, 2.0, -1.0], "cat", tmp_path / "sum")
    each, found = [changes(folder) for folder in folders], changes(tmp_path / "sum")
    assert found.keys() == {layer for one in each for layer in one}
    for layer, total in found.items():
        parts = [one[layer] * weight for one, weight in zip(each, (0.5, 2.0, -1.0), strict=True) if layer in one]
        assert torch.allclose(total, sum(parts), atol=1e-5), layer
    with_it = logits(peft_adapters.opened(model, tmp_path / "sum"))
    merge(find_adapter(tmp_path / "sum"), tmp_path / "merged")
    assert torch.allclose(logits(load_unsplit(tmp_path / "merged")), with_it, atol=1e-5)


@pytest.mark.parametrize("kind", ["all biases", "whole norm", "on the embedding", "tokens", "pissa", "invoked"])
def test_what_holds_more_than_factors_is_not_combined(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = peft_adapters.make("qwen2", kind, tiny_models["qwen2"], tmp_path / "adapter")
    with pytest.raises(InputError, match=r"cannot be combined: it is no LoRA, or does more than add B A to weights"):
        combine([find_adapter(folder)] * 2, [1, 1], "cat", tmp_path / "sum")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_heads_of_classes_are_not_combined(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    adapter = find_adapter(finished_run("gpt2", **CLASSES))
    with pytest.raises(InputError, match="has a head of classes, which PEFT cannot combine: merge it alone"):
        combine([adapter] * 2, [1, 1], "cat", tmp_path / "m")
    assert not (tmp_path / "m").exists()
