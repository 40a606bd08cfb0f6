"""Operations of the parts, beside those that torch counts as they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from split_models import parts_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsplit.adaptation.run_adapters import adapt, bare_parts, outlined
from fedsplit.corpora.sequences import behind
from fedsplit.model import flops
from fedsplit.model.flops import Flops, flops_of
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

ROWS, LENGTH = 2, 11


def counted(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The operations of a call by torch's own count, and its result. Attention computes by plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def step_of(parts: list[Any]) -> list[Flops]:
    """The operations of a step through bottom, trunk and top, by torch's count."""
    bottom, trunk, top = parts
    for part in parts:
        part.train()
        part.config._experts_implementation = "eager"  # torch does not count its grouped product of experts
    ids = torch.randint(1, 90, (ROWS, LENGTH))
    labels, _ = behind(bottom.virtual, ids, None)
    forwards, backwards = [0.0] * 3, [0.0] * 3
    forwards[0], sent = counted(lambda: bottom(ids))
    into = sent.detach().requires_grad_()
    forwards[1], output = counted(lambda: trunk(into))
    received = output.detach().requires_grad_()
    forwards[2], loss = counted(lambda: top(received, labels))
    backwards[2], _ = counted(lambda: loss.backward())
    backwards[1], _ = counted(lambda: output.backward(received.grad))
    if sent.requires_grad:
        backwards[0], _ = counted(lambda: sent.backward(into.grad))
    return [Flops(*pair) for pair in zip(forwards, backwards, strict=True)]


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products keep the scores, and their backward does not compute them again."""
    monkeypatch.setattr(flops, "ATTENTION_BACKWARD", 2.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mixtral", "qwen3_moe", "opt"])
@pytest.mark.parametrize("cut", [(1, 2), (0, 2), (1, 3)])
def test_every_family_counts_as_torch_does(family: str, cut: tuple[int, int], tiny_models: dict[str, Path]) -> None:
    parts = parts_of(tiny_models[family], cut)
    for part, counted_flops in zip(parts, step_of(parts), strict=True):
        estimated = flops_of(part, ROWS, LENGTH)
        assert astuple(estimated) == pytest.approx(astuple(counted_flops), rel=1e-9), part.kind


@pytest.mark.parametrize(
    "settings",
    [
        {"lora.targets": "c_fc"},  # the bottom's attention comes before the first trained module
        {"lora.targets": "c_proj"},
        {"lm_head": "full"},
        {"lm_head": "lora"},
        {"prompt.kind": "prompt", "prompt.tokens": 5},
    ],
    ids=str,
)
def test_what_is_trained_decides_about_the_backward(settings: dict[str, object]) -> None:
    parts = adapted(settings)
    for part, counted_flops in zip(parts, step_of(parts), strict=True):
        assert astuple(flops_of(part, ROWS, LENGTH)) == pytest.approx(astuple(counted_flops), rel=1e-9), part.kind


def test_prefixes_count_up_to_one_product_of_the_first_attention() -> None:
    """The first block's queries need no gradient, and only a part of its attention's backward is computed."""
    parts = adapted({"prompt.kind": "prefix", "prompt.tokens": 5})
    for part, counted_flops in zip(parts, step_of(parts), strict=True):
        assert astuple(flops_of(part, ROWS, LENGTH)) == pytest.approx(astuple(counted_flops), rel=0.01), part.kind


def adapted(settings: dict[str, object]) -> list[Any]:
    """Bottom, trunk and top of the bundled model, with adapters by settings."""
    config = build({"kernels": "library", "cut": "2:5", **settings})
    parts = [*bare_parts(config, ["bottom"]), *bare_parts(config, ["trunk"]), *bare_parts(config, ["top"])]
    for part in parts:
        adapt(part, config)
    return parts


def test_a_part_without_weights_counts_the_same() -> None:
    config = build({"cut": "2:5"})
    for part in (*bare_parts(config, ["bottom", "top"]), *bare_parts(config, ["trunk"])):
        adapt(part, config)
        assert flops_of(part, 3, 16) == flops_of(outlined(config, part.kind), 3, 16)


def test_the_fused_loss_leaves_out_the_last_position() -> None:
    library = flops_of(outlined(build({"kernels": "library"}), "top"), 1, 9)
    fused = flops_of(outlined(Config(), "top"), 1, 9)
    assert library.forward - fused.forward == 2 * 128 * 1024
