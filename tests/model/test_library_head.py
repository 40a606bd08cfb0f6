"""Logits by the library's own code."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from fedsplit.model.derivation import family_of
from fedsplit.model.library_head import LibraryHead, capped
from fedsplit.model.miniature import miniature


def test_logits_are_the_librarys_whatever_it_does_to_them() -> None:
    for large in (
        GraniteConfig(logits_scaling=8.0),
        CohereConfig(logit_scale=0.25),
        CONFIGS["opt"](),
        CONFIGS["gemma2"](),
    ):
        config = miniature(large)
        model = AutoModelForCausalLM.from_config(config).eval()
        seen: list[torch.Tensor] = []
        model.lm_head.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[3, 4, 5]])).logits
            found = LibraryHead(model, family_of(config).decoder, "lm_head")(seen[0], model.lm_head)
        assert torch.equal(found, expected)


def test_the_head_may_be_another_module_and_the_model_stays_as_it_was(tiny_models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    before = dict(model.named_modules())
    head = nn.Linear(32, 7, bias=False)
    library_head = LibraryHead(model, "model", "lm_head")
    states = torch.randn(1, 2, 32)
    assert torch.equal(library_head(states, head), head(states))
    assert dict(model.named_modules()) == before


def test_a_cap_bounds_logits() -> None:
    assert torch.equal(capped(torch.tensor([7.0]), None), torch.tensor([7.0]))
    assert float(capped(torch.tensor(1e9), 2.0)) == 2.0
