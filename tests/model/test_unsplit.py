"""The unsplit model, with weights and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
