"""Names of modules, found out from the library's classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    GptOssConfig,
    GraniteConfig,
    MambaConfig,
    PhiConfig,
    Qwen2MoeConfig,
    T5Config,
)

from fedsplit.errors import SettingError
from fedsplit.model.derivation import derive, family_of, text_config
from fedsplit.model.facts import read_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = {
    "decoder": "model",
    "blocks": "layers",
    "embedding": "embed_tokens",
    "positions": (),
    "before": (),
    "after": ("norm",),
    "targets": (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "narrows": ("down_proj",),
    "transposed": False,
    "head": "lm_head",
    "cap": None,
    "plain_head": True,
    "outgrows": None,
    "router": None,
    "parameters": {},
}
QK = ("q_norm", "k_norm", "input_layernorm", "post_attention_layernorm")
AROUND = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
EXPERTS = {
    "targets": ATTENTION,
    "router": "mlp.gate",
    "parameters": {
        "gate": "mlp.gate.weight",
        "gate_up_proj": "mlp.experts.gate_up_proj",
        "down_proj": "mlp.experts.down_proj",
    },
}

KNOWN: dict[str, dict[str, Any]] = {
    "gpt2": {
        "decoder": "transformer",
        "blocks": "h",
        "embedding": "wte",
        "positions": ("wpe",),
        "before": ("drop",),
        "after": ("ln_f",),
        "targets": ("c_attn", "c_proj", "c_fc"),
        "norms": ("ln_1", "ln_2"),
        "narrows": ("mlp.c_proj",),
        "transposed": True,
    },
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"norms": QK},
    "gemma2": {"norms": (*LLAMA["norms"], *AROUND), "cap": 2.0},
    "gemma3_text": {"norms": (*QK, *AROUND), "cap": 2.0},
    "phi3": {
        "targets": ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"),
        "outgrows": "original_max_position_embeddings",
    },
    "gpt_neox": {
        "decoder": "gpt_neox",
        "embedding": "embed_in",
        "before": ("emb_dropout",),
        "after": ("final_layer_norm",),
        "targets": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        "narrows": ("dense_4h_to_h",),
    },
    "opt": {
        "decoder": "model.decoder",
        "positions": ("embed_positions",),
        "after": ("final_layer_norm",),
        "targets": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "norms": ("self_attn_layer_norm", "final_layer_norm"),
        "narrows": ("fc2",),
    },
    "mixtral": {**EXPERTS, "narrows": ()},
    "qwen3_moe": {**EXPERTS, "norms": QK},
}
"""What was written by hand before it was derived."""


def as_sets(record: dict[str, Any]) -> dict[str, Any]:
    """Makes the order of names inside a block irrelevant: nothing depends on it."""
    sets = ("targets", "norms", "narrows")
    return {key: frozenset(value) if key in sets else value for key, value in record.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_derived_is_what_a_person_would_write(name: str) -> None:
    family = derive(CONFIGS[name]())
    found = {key: getattr(family, key) for key in LLAMA}
    assert as_sets(found) == as_sets({**LLAMA, **KNOWN[name]})


def test_every_name_is_there_in_the_real_model() -> None:
    for make in CONFIGS.values():
        config = make()
        family = family_of(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        decoder = model.get_submodule(family.decoder)
        for name in (family.blocks, family.embedding, *family.positions, *family.before, *family.after):
            decoder.get_submodule(name)


def test_a_scale_of_logits_is_no_plain_head() -> None:
    assert not family_of(GraniteConfig(logits_scaling=8.0)).plain_head
    assert family_of(GraniteConfig(logits_scaling=1.0)).plain_head


def test_projections_beside_experts_are_possible_and_no_default() -> None:
    family = family_of(Qwen2MoeConfig())
    assert family.targets == ATTENTION
    assert family.further == ("shared_expert_gate",)  # PEFT takes the others for the experts'
    assert family_of(GptOssConfig()).parameters.keys() == {"gate_up_proj", "down_proj", "router"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BertConfig(is_decoder=True), "type bert, which is an encoder: its tokens attend to later tokens"),
        (T5Config(), "type t5, which is an encoder with a decoder"),
        (AutoConfig.for_model("vit"), "type vit, of which transformers has no causal language model"),
        (AutoConfig.for_model("bert-generation"), r"its embedding \S+ is not beside one list of blocks"),
        (AutoConfig.for_model("cpmant"), r"its embedding \S+ is not beside one list of blocks"),
    ],
)
def test_another_shape_is_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        family_of(config)


def test_a_text_model_inside_a_model_of_images_is_taken_by_itself(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"
    assert text_config(tmp_path).model_type == "gemma3_text"


def test_a_projection_whose_weight_alone_is_read_gets_no_adapter() -> None:
    """Mamba multiplies with the weight of `dt_proj` itself, so that an adapter there would never learn."""
    family = family_of(MambaConfig())
    assert (family.targets, family.further) == (("in_proj", "x_proj"), ())


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_args: Any) -> str:
        raise AssertionError("a run has nobody to answer")

    monkeypatch.setattr("builtins.input", ask)
    document = {
        "model_type": "of_our_own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "code.py").write_text("raise AssertionError('this code has been run')")
    with pytest.raises(SettingError, match="its type is defined by code that comes with it, and such code is not run"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("says", "words"),
    [({"num_hidden_layers": 0}, "it has no blocks"), ({"hidden_act": "swooglu"}, "the library knows no 'swooglu'")],
)
def test_a_configuration_that_makes_no_model_is_refused(says: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        family_of(GraniteConfig(**says))


def test_a_head_with_a_bias_is_no_plain_head() -> None:
    """The fused loss adds no bias, so that an adapter of the head would be trained on other logits."""
    family = family_of(PhiConfig())
    assert family.biased_head and not family.plain_head
