"""Parts with their adapters off compute what the bare parts compute, to the bit, and go on with their adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from test_injection import SMALL
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.adaptation.base_weights import base_only, without_adapter
from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.adaptation.run_adapters import adapt
from fedsplit.model.kernels import IGNORED
from fedsplit.model.parts import Part
from fedsplit.model.split import load_parts
from fedsplit.settings.documents import build

IDS = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def through(parts: list[Part], mask: Tensor | None = MASK) -> Tensor:
    bottom, trunk, top = parts
    states = top.read(trunk(bottom(IDS, mask), mask), mask)
    logits, _ = top.aligned(states, IDS.masked_fill(MASK == 0, IGNORED), mask)
    return logits


def check(path: Path, settings: dict[str, object]) -> None:
    """Compares parts with adapters that are not zero, adapters off, with bare parts."""
    config = build({"model": str(path), "cut": "1:2", "train.max_length": 16, **settings})
    bare = [part.eval() for part in load_parts(path, config.bounds, ["bottom", "trunk", "top"], kernels=config.kernels)]
    adapted = load_parts(path, config.bounds, ["bottom", "trunk", "top"], kernels=config.kernels)
    for part in adapted:
        adapt(part, config)
        for number, parameter in enumerate(lora.parameters(part).values()):
            generator = torch.Generator().manual_seed(number)
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    places = config.prompt.virtual
    mask = torch.nn.functional.pad(MASK, (places, 0), value=1)
    for part in adapted:
        part.eval()
    with torch.no_grad():
        before = through_adapted(adapted, mask, places)
    assert before.shape[1] == 5 + places
    for part in adapted:
        part.train()
    with base_only(adapted[0]), base_only(adapted[1]), base_only(adapted[2]):
        found = through(adapted)
    with torch.no_grad():
        expected = through(bare)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(part.training for part in adapted)
    assert all(parameter.requires_grad for part in adapted for parameter in lora.parameters(part).values())
    for part in adapted:
        part.eval()
    with torch.no_grad():
        assert torch.equal(through_adapted(adapted, mask, places), before)
    assert not torch.allclose(before[:, places:], expected, atol=1e-3)


def through_adapted(parts: list[Part], mask: Tensor, places: int) -> Tensor:
    bottom, trunk, top = parts
    states = top.read(trunk(bottom(IDS, mask), mask), mask)
    labels = torch.nn.functional.pad(IDS, (places, 0), value=IGNORED)
    return top.aligned(states, labels, mask)[0]


@pytest.mark.parametrize("method", [name for name, method in ADAPTER_METHODS.items() if not method.residual])
def test_every_method_can_be_turned_off(method: str, tiny_models: dict[str, Path]) -> None:
    settings: dict[str, object] = {"lora.method": method, "lora.options": SMALL.get(method, "")}
    if ADAPTER_METHODS[method].dropout is not None:
        settings["lora.dropout"] = 0.0
    if ADAPTER_METHODS[method].rank is not None:
        settings["lora.rank"] = 4
    check(tiny_models["llama"], settings)


@pytest.mark.parametrize("kernels", ["fused", "library"])
def test_every_family_has_its_base_model(any_model_path: Path, kernels: str) -> None:
    check(any_model_path, {"lora.rank": 2, "kernels": kernels})


@pytest.mark.parametrize("kernels", ["fused", "library"])
def test_an_adapted_head_is_the_bases(model_path: Path, kernels: str) -> None:
    check(model_path, {"lora.rank": 2, "lm_head": "lora", "kernels": kernels})


@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_virtual_tokens_and_prefixes_are_left_out(kind: str, model_path: Path) -> None:
    check(model_path, {"prompt.kind": kind, "prompt.tokens": 3})


def test_experts_with_adapters_are_the_bases(tiny_models: dict[str, Path]) -> None:
    targets = ("gate_up_proj", "down_proj")
    check(tiny_models["mixtral"], {"lora.rank": 2, "lora.dropout": 0.0, "lora.targets": targets})


def test_an_error_leaves_the_adapter_on(tiny_models: dict[str, Path]) -> None:
    (bottom,) = load_parts(tiny_models["llama"], (1, 2), ["bottom"])
    adapt(bottom, build({"model": str(tiny_models["llama"]), "cut": "1:2", "prompt.kind": "prefix"}))
    kind, ahead = type(bottom), bottom.ahead
    with pytest.raises(KeyError), without_adapter(bottom):
        raise KeyError
    assert type(bottom) is kind and bottom.ahead == ahead > 0
