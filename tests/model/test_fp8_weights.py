"""Checkpoints with weights in float8, and scales by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from fedsplit.model.checkpoint_reader import check_checkpoint
from fedsplit.model.fp8_weights import SCALE, unscaled
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit

BLOCK = 32
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 97,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def scaled(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8, and its scales."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448.0
    small = blocks / scales[:, None, :, None]
    return small.reshape(rows, columns).to(torch.float8_e4m3fn), scales


@pytest.fixture(params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint as others publish it: every projection of the blocks in float8."""
    mixture = request.param == "qwen3_moe"
    config = Qwen3MoeConfig(**SIZES, **MIXTURE) if mixture else LlamaConfig(**SIZES)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}{SCALE}"] = scaled(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path


def test_the_parts_are_the_unsplit_model_that_transformers_loads(folder: Path) -> None:
    check_checkpoint(folder)
    ids = torch.tensor([[3, 4, 5, 6]])
    bottom, trunk, top = load_parts(folder, (1, 2), ["bottom", "trunk", "top"])
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = load_unsplit(folder)(input_ids=ids).logits
        assert torch.equal(top.logits(trunk(bottom(ids))), expected)


def test_values_are_scaled_block_by_block() -> None:
    weight = torch.randn(64, 96)
    values = unscaled(*scaled(weight))
    assert values.dtype == torch.float32
    assert float((values - weight).abs().max()) < 0.1 * float(weight.abs().max())


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        unscaled(torch.ones(3, 4).to(torch.float8_e4m3fn), torch.ones(2, 1))
