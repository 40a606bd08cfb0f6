"""No number moves unless it should: small federations against the record of what they gave before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import same_numbers
import torch
from safetensors.torch import save_file


def test_a_files_norm_is_that_of_all_its_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[2, 4]])}
    (tmp_path / "part").mkdir()
    save_file(tensors, tmp_path / "part" / "adapter.safetensors")
    assert same_numbers.norms(tmp_path) == {"part/adapter.safetensors": 5.0}


@pytest.mark.parametrize("case", sorted(same_numbers.CASES))
def test_a_federation_gives_the_numbers_on_record(
    case: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """To the bit on a machine like that of the record; elsewhere losses and norms to rounding.

    A change that is meant to move numbers runs `python -m tests.same_numbers --write`, and its commit says why.
    """
    recorded = json.loads(same_numbers.RECORD.read_text())
    expected, found = recorded["cases"][case], same_numbers.play(case, tiny_models, corpus_file, tmp_path / "run")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    if recorded["machine"] == same_numbers.machine():
        assert found == expected
