"""The adapter that a run starts from, on the parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft_adapters import PLACES, make, opened
from split_models import batch_of, logits_of
from transformers import AutoModelForCausalLM

from fedsplit.adaptation import adapter_files, initial_adapter, lora, prompts, run_adapters
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings, PromptSettings
from fedsplit.updates import Adapters

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("frozen", {}),
    "rslora": ("frozen", {"rslora": True}),
    "on the head": ("lora", {}),
    "whole head": ("full", {}),
    "dora": ("frozen", {"method": "dora"}),
}
"""By PEFT's adapter: what of the head a run trains that can start from it, and its other settings of LoRA."""


def settings_for(family: str, kind: str, model: Path, folder: Path) -> Config:
    """A run that makes such adapters itself, and starts from one."""
    head, more = KINDS[kind]
    given = LoraSettings(rank=(4,), alpha=6.0, dropout=0.0, targets=tuple(PLACES[family][0]), **more)
    return Config(
        model=str(model), cut="1:2", kernels="library", lora=given, lm_head=head, init_adapter=str(folder / "adapter")
    )


def parts_of(config: Config) -> list[Any]:
    parts = run_adapters.bare_parts(config, ["bottom", "trunk", "top"])
    for part in parts:
        run_adapters.adapt(part, config)
    return [part.eval() for part in parts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_parts_compute_what_peft_does_to_the_bit(
    family: str, kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_models[family]
    config = settings_for(family, kind, model, tmp_path)
    make(family, kind, model, Path(config.init_adapter))
    ids, mask, _ = batch_of("left")
    with torch.no_grad():
        found = logits_of(parts_of(config), ids, mask)
        expected = opened(model, Path(config.init_adapter))(input_ids=ids, attention_mask=mask).logits
        base = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found[mask == 1], expected[mask == 1])
    assert not torch.allclose(base, expected)


def test_all_that_the_start_is_of_still_trains(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    config = settings_for("gpt2", "plain", tiny_models["gpt2"], tmp_path)
    make("gpt2", "plain", tiny_models["gpt2"], Path(config.init_adapter))
    for part in parts_of(config):
        assert part.adapter and all(parameter.requires_grad for parameter in lora.parameters(part).values())


def changes(adapters: Adapters) -> dict[str, torch.Tensor]:
    return {layer: (found := adapters.change(layer)).up @ found.down for layer in adapters.complete}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_larger_rank_adds_the_same_and_a_smaller_one_what_is_left(
    rslora: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Rank 4 and alpha 6 in the file; the run has others, and another rule for the scaling."""
    config = settings_for("llama", "plain", tiny_models["llama"], tmp_path)
    make("llama", "plain", tiny_models["llama"], Path(config.init_adapter))
    filed = adapter_files.load(Path(config.init_adapter))
    for rank in (4, 7, 2):
        given = replace(config.lora, rank=(rank,), alpha=5.0, rslora=rslora)
        started = lora.read(*parts_of(replace(config, lora=given)))
        assert {started.rank(layer) for layer in started.layers} == {rank}
        expected, found = changes(filed.with_rank(min(rank, 4))), changes(started)
        assert expected.keys() == found.keys() != set()
        for layer, change in expected.items():
            torch.testing.assert_close(found[layer], change, rtol=1e-5, atol=1e-7)


def test_ranks_by_layer_come_to_the_runs(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    config = settings_for("gpt2", "plain", tiny_models["gpt2"], tmp_path)
    make("gpt2", "ranks by layer", tiny_models["gpt2"], Path(config.init_adapter))
    filed, started = adapter_files.load(Path(config.init_adapter)), lora.read(*parts_of(config))
    assert len({filed.rank(layer) for layer in filed.layers}) == 2
    for layer, change in changes(filed).items():
        torch.testing.assert_close(changes(started)[layer], change, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_and_prefixes_are_those_of_the_file(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model, folder = tiny_models["llama"], tmp_path / "adapter"
    cls = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), cls("CAUSAL_LM", num_virtual_tokens=3))
    tuned.save_pretrained(folder)
    config = Config(
        model=str(model),
        cut="1:2",
        kernels="library",
        prompt=PromptSettings(kind=kind, tokens=3),
        init_adapter=str(folder),
    )
    parts = parts_of(config)
    saved = initial_adapter.read(config).tensors["prompt_embeddings"]
    flat = prompts.flattened(lora.read(*parts).tensors, config.prompt, tuned.get_base_model().config)
    assert torch.equal(flat, saved)
    ids, _, _ = batch_of("none")
    with torch.no_grad():
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder)).eval()
        mask = torch.ones(len(ids), ids.shape[1] + (3 if kind == "prompt" else 0), dtype=torch.long)
        found = logits_of(parts, ids, mask if kind == "prompt" else None)
        expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected)


def test_a_finished_run_is_opened_without_the_adapter_that_it_started_from(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = settings_for("gpt2", "plain", tiny_models["gpt2"], tmp_path)
    make("gpt2", "plain", tiny_models["gpt2"], tmp_path / "finished")
    parts = run_adapters.bare_parts(config, ["bottom", "trunk", "top"])
    run_adapters.adopt(tmp_path / "finished", config, *parts)
    assert not Path(config.init_adapter).exists()
    assert run_adapters.outline(config, ["trunk"]).layers


def test_methods_that_cannot_start_from_a_file_say_why() -> None:
    def reason(method: str = "lora", **prompt: Any) -> str:
        config = Config(lora=LoraSettings(method=method), prompt=PromptSettings(**prompt))
        return initial_adapter.can_start(config)

    assert reason() == reason("dora") == reason("ia3") == reason(kind="prompt") == reason(kind="prefix") == ""
    assert "base weights" in reason("pissa") and "base weights" in reason("olora")
    assert "more ranks" in reason("adalora")
    assert "encoder" in reason(kind="ptuning") and "encoder" in reason(kind="prefix", projection=True)
