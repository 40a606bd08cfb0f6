"""Adapters that PEFT alone made, of every kind that a command after a run may be given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM

PLACES = {
    "gpt2": (["c_attn", "c_proj"], "wte", "ln_f"),
    "llama": (["q_proj", "v_proj", "down_proj"], "embed_tokens", "norm"),
    "qwen2": (["q_proj", "v_proj", "down_proj"], "embed_tokens", "norm"),
}
"""By family: projections, the embedding and a norm. The first stores (in, out); first and third tie the head."""


def config_of(family: str, kind: str) -> Any:
    """PEFT's configuration of a kind."""
    targets, words, norm = PLACES[family]
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "bias of its layers": {"bias": "lora_only"},
        "all biases": {"bias": "all"},
        "whole embedding": {"modules_to_save": [words]},
        "whole embedding, tied": {"modules_to_save": [words], "ensure_weight_tying": True},
        "whole norm": {"modules_to_save": [norm]},
        "whole head": {"modules_to_save": ["lm_head"]},
        "whole ends": {"modules_to_save": [words, "lm_head"]},
        "on the embedding": {"target_modules": [*targets, words]},
        "on the embedding, tied": {"target_modules": [*targets, words], "ensure_weight_tying": True},
        "dora on the embedding": {"target_modules": [*targets, words], "use_dora": True},
        "on the head": {"target_modules": [*targets, "lm_head"]},
        "on the head alone": {"target_modules": ["lm_head"]},
        "on both ends": {"target_modules": [*targets, words, "lm_head"]},
        "on all linear layers": {"target_modules": "all-linear"},
        "by a pattern": {"target_modules": rf".*\.1\..*({'|'.join(targets)})"},
        "tokens": {"trainable_token_indices": [3, 5, 7]},
        "ranks by layer": {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[-1]: 12}},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "without a module": {"exclude_modules": [targets[-1]]},
        "some blocks": {"layers_to_transform": [0, 2]},
        "bias of the factors": {"lora_bias": True},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "of no task": {"task_type": None},
        "invoked": {"alora_invocation_tokens": [3]},
        "replicated": {"layer_replication": [[0, 2], [1, 3]]},
    }
    if kind == "norms":
        return LNTuningConfig(task_type="CAUSAL_LM")
    if kind == "tokens alone":
        return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 5])
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": targets, **kinds[kind]}
    return LoraConfig(**given)


def make(family: str, kind: str, model: Path, folder: Path, seed: int = 1, ends: bool = True) -> Path:
    """Writes an adapter, no value of which is where training starts.

    Args:
        family: The model's.
        kind: One that `config_of` knows.
        model: The base model's folder.
        folder: Where to.
        seed: Decides the values.
        ends: Whether base weights of an adapted embedding or head go into the file, as PEFT likes it.
    """
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config_of(family, kind))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        tuned.save_pretrained(folder, save_embedding_layers="auto" if ends else False)
    return folder


def opened(model: Path, folder: Path) -> Any:
    """The base with an adapter beside it, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder)).eval()
