"""The check of an adapter that a run is to start from, and runs that do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from peft import IA3Config, LoraConfig, get_peft_model
from peft_adapters import PLACES, make, opened
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedsplit
from fedsplit.errors import InputError
from fedsplit.federation.manifest import content_of
from fedsplit.model.derivation import family_of
from fedsplit.results.initial import check_initial, stated
from fedsplit.results.measuring import held_out_loss
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings, PromptSettings


def config_for(model: Path, folder: Path, **lora: Any) -> Config:
    targets = tuple(PLACES["gpt2"][0])
    given = LoraSettings(**{"rank": (4,), "alpha": 6.0, "targets": targets, **lora})
    return Config(model=str(model), cut="1:2", lora=given, init_adapter=str(folder))


def check(config: Config, classes: int = 0) -> list[str]:
    check_initial(config, family_of(CONFIGS["gpt2"]()), classes)
    return stated(config)


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["gpt2"]


def test_what_fits_is_told_with_what_becomes_of_its_rank(model: Path, tmp_path: Path) -> None:
    folder = make("gpt2", "plain", model, tmp_path / "adapter")
    begin = f"starts from the adapter in {folder}"
    assert check(config_for(model, folder)) == [begin]
    assert check(config_for(model, folder, rank=(2, 8))) == [f"{begin}; ranks: 4 filled with zeros to 8"]
    assert check(config_for(model, folder, rank=(2,), rslora=True)) == [f"{begin}; ranks: 4 cut to 2"]
    assert check(replace(config_for(model, folder), init_adapter="")) == []


def test_an_adapter_on_the_head_may_bring_the_models_own_weight_and_no_other(model: Path, tmp_path: Path) -> None:
    """PEFT writes it, and a run does not read it."""
    folder = make("gpt2", "on the head", model, tmp_path / "adapter")
    config = replace(config_for(model, folder, rank=(8,)), lm_head="lora")
    assert check(config) == [f"starts from the adapter in {folder}; ranks: 4 filled with zeros to 8"]
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its lm_head.base_layer.weight is not the model's\) is not possible"):
        check(config)


def other_kinds(model: Path, root: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    ia3 = IA3Config("CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    get_peft_model(base, ia3).save_pretrained(root / "ia3")
    sorts = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    named = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=PLACES["gpt2"][0], fan_in_fan_out=True)
    get_peft_model(sorts, named).save_pretrained(root / "classes")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gone", {}, r"init_adapter: .*gone \(it has no adapter_config.json\) is not possible; allowed: the folder of a"),
    ("on the head", {}, r"it has lm_head.lora_A.weight\).*--lora.targets and --lm-head"),
    ("plain", {"targets": ("c_attn",)}, r"\(it has transformer.h.0.attn.c_proj.lora_A.weight\)"),
    ("plain", {"targets": ("c_attn", "c_proj", "c_fc")}, r"\(it lacks transformer.h.0.mlp.c_fc.lora_A.weight\)"),
    ("some blocks", {}, r"\(it lacks transformer.h.1.attn.c_attn.lora_A.weight\)"),
    ("dora", {}, r"\(use_dora is True\) is not possible; allowed: one that adds s \* B @ A to layers"),
    ("whole norm", {}, r"\(it has transformer.ln_f.*\) is not possible"),
    ("ia3", {}, r"\(its kind is IA3\)"),
    ("plain", {"method": "dora"}, r"\(its use_dora is False\) is not possible; allowed: .* whose use_dora is True"),
    ("plain", {"method": "pissa"}, r"allowed: none here, since pissa starts from the base weights themselves"),
    ("classes", {}, r"\(tells 3 classes\) is not possible; allowed: an adapter that predicts tokens, as the run does"),
]


@pytest.mark.parametrize(("kind", "lora", "words"), REFUSED, ids=[f"{kind}-{lora}" for kind, lora, _ in REFUSED])
def test_what_does_not_fit_is_refused_with_the_reason(
    kind: str, lora: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    if kind in ("ia3", "classes"):
        other_kinds(model, tmp_path)
    elif kind != "gone":
        make("gpt2", kind, model, tmp_path / kind)
    with pytest.raises(InputError, match=words) as refused:
        check(config_for(model, tmp_path / kind, **lora))
    assert "\n" not in str(refused.value)


def test_one_of_another_model_of_another_number_of_classes_or_damaged_is_refused(
    model: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = make("gpt2", "plain", model, tmp_path / "adapter")
    with pytest.raises(InputError, match="does not fit the model"):
        check_initial(config_for(tiny_models["llama"], folder), family_of(CONFIGS["llama"]()))
    with pytest.raises(InputError, match=r"\(predicts tokens\) is not possible; allowed: an adapter that tells 2"):
        check(config_for(model, folder), classes=2)
    prompt = replace(config_for(model, folder), lora=LoraSettings(), prompt=PromptSettings(kind="prompt"))
    with pytest.raises(InputError, match=r"\(its peft_type is LORA\) is not possible; .* is PROMPT_TUNING"):
        check(prompt)
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        check(config_for(model, folder))


def test_a_manifest_knows_the_adapter_by_its_content(model: Path, tmp_path: Path) -> None:
    folder = make("gpt2", "plain", model, tmp_path / "adapter")
    one = content_of([], model, model, str(folder))
    assert set(one.start) == {"adapter_config.json", "adapter_model.safetensors"}
    make("gpt2", "plain", model, folder, seed=2)
    assert content_of([], model, model, str(folder)).start != one.start
    assert content_of([], model, model).start == {}


SMALL = {"cut": "1:2", "clients": 2, "rounds": 1, "engine": "local", "threads": 1, "kernels": "library"}
SMALL |= {"train": {"steps": 1, "batch_size": 2, "max_length": 16, "lr": 0.05}, "eval": {"samples": 2, "after": 0}}
SMALL |= {"lora": {"rank": 4, "alpha": 6.0, "targets": PLACES["gpt2"][0], "dropout": 0.0}}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["shared", "copies"])
def test_a_run_begins_where_peft_is_with_the_adapter_and_goes_on_to_the_bit(
    schedule: str, model: Path, corpus_file: Path, tmp_path: Path
) -> None:
    folder = make("gpt2", "plain", model, tmp_path / "adapter")
    given = {**SMALL, "model": model, "dataset": corpus_file, "init_adapter": folder, "trunk__schedule": schedule}
    straight = fedsplit.run(**{**given, "rounds": 2}, out=tmp_path / "straight")
    before = straight.summary["eval_loss"]["before"]
    assert before == pytest.approx(held_out_loss(opened(model, folder), straight.folder), abs=1e-6)
    assert before != pytest.approx(held_out_loss(AutoModelForCausalLM.from_pretrained(model), straight.folder), abs=0.1)
    assert straight.config.init_adapter == str(folder)
    one = fedsplit.run(**given, out=tmp_path / "one")
    on = fedsplit.run(resume=one.folder, rounds=2)
    first, second = (load_file(run.folder / "adapter/adapter_model.safetensors") for run in (straight, on))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    manifest = json.loads((on.folder / "checkpoints/round-0002/manifest.json").read_text())
    assert len(manifest["content"]["init_adapter"]) == 2
    make("gpt2", "plain", model, folder, seed=2)
    with pytest.raises(InputError, match=r"^init_adapter: .*another adapter_model.safetensors.* the adapter with"):
        fedsplit.run(resume=one.folder, rounds=3)


@pytest.mark.slow
def test_clients_of_several_ranks_start_from_it_and_fresh_starts_are_refused(
    model: Path, corpus_file: Path, tmp_path: Path
) -> None:
    folder = make("gpt2", "plain", model, tmp_path / "adapter")
    lora = {**SMALL["lora"], "rank": (2, 4)}  # type: ignore[dict-item]
    given = {**SMALL, "model": model, "dataset": corpus_file, "init_adapter": folder, "lora": lora}
    result = fedsplit.run(**given, strategy="fedex", trunk__schedule="copies", out=tmp_path / "mixed")
    before = held_out_loss(opened(model, folder), result.folder)
    assert result.summary["eval_loss"]["before"] == pytest.approx(before, abs=1e-5)
    with pytest.raises(InputError, match=r"^init_adapter: .* allowed: none under a strategy that starts every round"):
        fedsplit.run(**given, strategy="flora", out=tmp_path / "flora")
