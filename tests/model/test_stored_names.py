"""Where a parameter comes from in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from fedsplit.model.split import load_parts
from fedsplit.model.stored_names import sources_of


def empty(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name]())


def test_experts_are_in_the_order_of_their_numbers() -> None:
    stored = [
        f"model.layers.0.mlp.experts.{number}.{piece}_proj.weight" for number in range(12) for piece in ("up", "gate")
    ]
    source = sources_of(empty("qwen3_moe"), reversed(stored))["model.layers.0.mlp.experts.gate_up_proj"]
    assert source.is_stack and source.is_complete
    assert source.pieces[0] == [f"model.layers.0.mlp.experts.{number}.gate_proj.weight" for number in range(12)]


def test_a_missing_piece_makes_a_source_incomplete() -> None:
    source = sources_of(empty("qwen3_moe"), ["model.layers.0.mlp.experts.0.up_proj.weight"])
    assert not source["model.layers.0.mlp.experts.gate_up_proj"].is_complete


def test_names_without_the_decoders_are_known() -> None:
    sources = sources_of(empty("gpt2"), ["wte.weight"])
    assert sources["transformer.wte.weight"].names == ["wte.weight"]


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one tensor twice, as transformer\.wte\.weight and as wte\.weight"):
        sources_of(empty("gpt2"), ["wte.weight", "transformer.wte.weight"])


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_inside_a_model_of_images_is_read_and_no_other_tower(tmp_path: Path, prefix: str) -> None:
    """Under the names of today, and under those of older checkpoints."""
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    # The library caps the logits of the text model alone, and no Gemma 3 has a cap.
    text = {**CONFIGS["gemma3_text"]().to_dict(), "final_logit_softcapping": None}
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        inner = name.replace("model.language_model.", "").replace("language_model.model.", "")
        tensors[prefix + inner if inner != name else name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})

    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = whole(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        bottom, trunk, top = load_parts(tmp_path, (1, 2), ["bottom", "trunk", "top"])
        assert torch.equal(top.logits(trunk(bottom(ids))), expected)
    assert not any("vision" in name for part in (bottom, trunk, top) for name, _ in part.named_parameters())
