"""Twenty steps through the cut are twenty steps of plain PEFT on the unsplit model, for types of different build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.model.derivation import build, family_of
from fedsplit.model.miniature import VOCABULARY, miniature
from fedsplit.model.split import load_parts
from fedsplit.settings.sections import LoraSettings

STEPS = 20
SETTINGS = LoraSettings(rank=(4,), alpha=8.0, dropout=0.0)

TYPES = ("gemma", "granite", "cohere2", "falcon", "bloom", "gpt_oss", "olmo2", "phi", "qwen3_next", "mamba")
"""Scaled embeddings; scaled logits and residuals; parallel blocks; one key for all heads; ALiBi; experts with sinks;
norms after the projections; partial rotation; linear attention; no attention."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_losses_and_adapters_are_those_of_the_unsplit_model(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = miniature(CONFIG_MAPPING[model_type]())
    family = family_of(config)
    build(config).save_pretrained(tmp_path)
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), make_config(SETTINGS, family)).eval()
    cut = (1, max(2, config.num_hidden_layers - 1))
    parts = load_parts(tmp_path, cut, ["bottom", "trunk", "top"])
    adapters: dict[str, torch.nn.Parameter] = {}
    for part in parts:
        lora.add(part, SETTINGS, seed=0)
        adapters |= lora.parameters(part)
    trained = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in whole.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == adapters.keys()
    for name, parameter in trained.items():
        parameter.data.copy_(adapters[name].data)

    ours = torch.optim.AdamW(adapters.values(), lr=1e-2)
    theirs = torch.optim.AdamW([trained[name] for name in adapters], lr=1e-2)
    bottom, trunk, top = parts
    losses = []
    for step in range(STEPS):
        ids = torch.randint(VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(step))
        loss = top(trunk(bottom(ids)), ids)
        expected = whole(input_ids=ids, labels=ids, use_cache=False).loss
        assert torch.equal(loss, expected), step
        losses.append(float(loss.detach()))
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert losses[0] != losses[-1]
    assert all(torch.equal(adapters[name], trained[name]) for name in adapters)
