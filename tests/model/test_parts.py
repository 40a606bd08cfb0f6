"""What each part has of the whole, and what it has not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS
from split_models import batch_of, logits_of

from fedsplit.model.parts import ranges
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit

KINDS = ("bottom", "trunk", "top")

CUTS = [cut for cut in itertools.product(range(BLOCKS + 1), repeat=2) if cut[0] < cut[1]]


@pytest.mark.parametrize("cut", CUTS)
def test_a_part_holds_its_own_weights_and_no_others(any_model_path: Path, cut: tuple[int, int]) -> None:
    stored = dict(load_unsplit(any_model_path).named_parameters())
    seen: dict[str, str] = {}
    for part in load_parts(any_model_path, cut, KINDS):
        for name, parameter in part.named_parameters():
            whole = part.unsplit_name(name)
            assert not parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert whole not in seen, f"{whole} is in {seen[whole]} and in {part.kind}"
            seen[whole] = part.kind
            if whole in stored:
                assert torch.equal(parameter, stored[whole])
        assert not any(tensor.is_meta for name, tensor in part.named_buffers() if "attn.bias" not in name)
    assert stored.keys() <= seen.keys()
    blocks = {kind: len(numbers) for kind, numbers in ranges(BLOCKS, cut).items()}
    assert sum(blocks.values()) == BLOCKS


def test_a_tied_head_is_the_embedding_itself(any_model_path: Path) -> None:
    bottom, top = load_parts(any_model_path, (1, 2), ("bottom", "top"))
    tied = top.lm_head.weight is getattr(bottom.decoder, bottom.family.embedding).weight
    assert tied == load_unsplit(any_model_path).config.tie_word_embeddings


def test_opt_without_a_final_norm(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Old checkpoints have none; even older ones lack the decoder's outermost name."""
    from safetensors.torch import load_file, save_file

    source = tiny_models["opt"]
    document = json.loads((source / "config.json").read_text()) | {"_remove_final_layer_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(document))
    tensors = {
        name: t
        for name, t in load_file(source / "model.safetensors").items()
        if "final_layer_norm" not in name or "layers" in name
    }
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    ids, mask, _ = batch_of("left")
    expected = load_unsplit(tmp_path)(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits_of(load_parts(tmp_path, (1, 2), KINDS), ids, mask), expected)
