"""The comparisons between a small model, uncut and cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS

from fedsplit.model.derivation import family_of
from fedsplit.model.miniature import miniature
from fedsplit.proving.comparisons import Chain, Difference, Subject, same


def test_tensors_are_compared_to_the_bit() -> None:
    ones = torch.ones(2, 3)
    same(ones, ones.clone())
    with pytest.raises(Difference, match=r"^differs from the uncut model by up to 1\.2e-07$"):
        same(ones + 2**-23, ones)
    with pytest.raises(Difference, match=r"the shape is \(2, 3\), and \(3, 2\) uncut"):
        same(ones, ones.reshape(3, 2))


def test_a_model_and_its_parts_agree_and_another_models_parts_do_not(tmp_path: Path) -> None:
    config = miniature(CONFIGS["llama"]())
    family = family_of(config)
    torch.manual_seed(0)
    first, second = (Subject(tmp_path / name, config, family) for name in ("first", "second"))
    for _, find_difference in Chain(first, (0, 1)).checks():
        find_difference()
    first.folder = second.folder
    for check, find_difference in Chain(first, (0, 1)).checks():
        if check in ("logits", "padding left", "padding right", "loss"):
            with pytest.raises(Difference):
                find_difference()


def test_noise_makes_norms_matter(tmp_path: Path) -> None:
    """The library draws norms that change nothing, so a norm in the wrong place would not show."""
    config = miniature(CONFIGS["llama"]())
    subject = Subject(tmp_path, config, family_of(config))
    assert float((subject.model.model.norm.weight - 1).abs().max()) > 0.01
