"""What a config.json may say beside the usual: the split model is the unsplit one all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from test_split import CUTS, _compare, _pair
from transformers import AutoModelForCausalLM

from fedsplit.model.checkpoint_reader import check_checkpoint

_ROPE = {"rope_theta": 10.0, "original_max_position_embeddings": 8}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 in plain attention, reordered": (
        "gpt2",
        {"reorder_and_upcast_attn": True, "scale_attn_weights": False, "_attn_implementation": "eager"},
    ),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48, "activation_function": "relu"}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3's positions": (
        "llama",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "yarn": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "dynamic positions": (
        "llama",
        {"rope_parameters": {"rope_theta": 10.0, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2 with full attention": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "gemma2 without caps": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3's default layers": ("gemma3_text", {"layer_types": None, "final_logit_softcapping": None}),
    "phi3 with short positions": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}),
    "phi3 with a part of the positions": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt with norms behind": ("opt", {"do_layer_norm_before": False, "enable_bias": False}),
    "opt with bare norms": ("opt", {"layer_norm_elementwise_affine": False}),
    "mixtral without a window": ("mixtral", {"sliding_window": None, "num_experts_per_tok": 1}),
    "mixtral with a noisy router": ("mixtral", {"router_jitter_noise": 0.1}),
    "qwen3_moe with every other block": ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    "qwen3_moe with windows": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": False, "attention_bias": True},
    ),
    "qwen3_moe without experts": ("qwen3_moe", {"num_experts": 0}),
}


def variant(name: str, folder: Path) -> Path:
    """Saves a tiny random model of that kind."""
    family, says = VARIANTS[name]
    usual = CONFIGS[family]()
    config = type(usual).from_dict({**usual.to_dict(), **says})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_split_equals_unsplit(name: str, tmp_path: Path) -> None:
    """To the bit, at one cut and with one padding."""
    path = variant(name, tmp_path)
    check_checkpoint(path)
    for quantity, (mine, theirs) in _compare(_pair(path, (1, 2), 0.0), "left").items():
        assert torch.equal(mine, theirs), quantity


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_split_equals_unsplit_at_every_cut(name: str, tmp_path: Path) -> None:
    path = variant(name, tmp_path)
    for cut in CUTS:
        pair = _pair(path, cut, 0.0)
        for padding in ("left", "right"):
            for quantity, (mine, theirs) in _compare(pair, padding).items():
                assert torch.equal(mine, theirs), f"{quantity}, cut {cut}, padding {padding}"
