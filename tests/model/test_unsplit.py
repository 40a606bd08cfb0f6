"""The unsplit model, with weights and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_image_model
from transformers import AutoModelForCausalLM

from fedsplit.model.unsplit import empty_model, load_unsplit


def test_a_blank_model_has_the_names_and_shapes_of_the_whole_and_no_values(any_model_path: Path) -> None:
    whole = dict(load_unsplit(any_model_path).named_parameters())
    empty = dict(empty_model(any_model_path).named_parameters())
    assert {name: p.shape for name, p in empty.items()} == {name: p.shape for name, p in whole.items()}
    assert all(p.is_meta for p in empty.values())


def test_a_classifier_has_the_models_body_and_a_head_of_its_classes(model_path: Path) -> None:
    whole, sorts = load_unsplit(model_path), load_unsplit(model_path, classes=5, pad=7)
    assert (sorts.score.out_features, sorts.config.num_labels, sorts.config.pad_token_id) == (5, 5, 7)
    body = dict(sorts.named_parameters())
    shared = [name for name, _ in whole.named_parameters() if name in body]
    assert len(shared) == len(body) - 1
    assert all(torch.equal(whole.get_parameter(name), body[name]) for name in shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_type_that_is_asked_for(model_path: Path, dtype: torch.dtype) -> None:
    assert {p.dtype for p in load_unsplit(model_path, dtype).parameters()} == {dtype}


@pytest.mark.parametrize("original", [True, False])
def test_of_a_model_of_images_the_text_model_alone_is_loaded_and_saved(tmp_path: Path, original: bool) -> None:
    """Its names in the files are those of today, or those of older checkpoints (the library's default)."""
    whole = write_image_model(tmp_path / "images", save_original_format=original)
    text = load_unsplit(tmp_path / "images").eval()
    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(text).__name__ == type(again).__name__ == "Gemma3ForCausalLM"
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = whole(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    assert torch.equal(text(input_ids=ids).logits, expected)
    assert torch.equal(again(input_ids=ids).logits, expected)
