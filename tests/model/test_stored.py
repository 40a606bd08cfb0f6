"""Checkpoints: names of all kinds, shards, types, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from split_models import batch_of, logits_of

from fedsplit.allowed import SettingError
from fedsplit.model.families import FAMILIES
from fedsplit.model.split import load_parts
from fedsplit.model.stored import check_checkpoint
from fedsplit.model.unsplit import load_whole

KINDS = ("bottom", "trunk", "top")


def test_tensors_are_read_under_the_librarys_names_and_under_the_checkpoints(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """Experts one by one and stacked; a head that the checkpoint calls otherwise."""
    ids, mask, _ = batch_of("left")
    for family in ("gpt_neox", "mixtral", "qwen3_moe"):
        source, ends = tiny_models[family], FAMILIES[family].stored
        with safe_open(source / "model.safetensors", framework="pt") as file:
            assert not any(name.endswith(tuple(ends)) for name in file.keys())  # noqa: SIM118
        check_checkpoint(source)
        whole = load_whole(source)
        folder = tmp_path / family
        whole.save_pretrained(folder, save_original_format=False)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert all(any(name.endswith(end) for name in file.keys()) for end in ends)  # noqa: SIM118
        check_checkpoint(folder)
        expected = whole(input_ids=ids, attention_mask=mask).logits
        for path in (source, folder):
            assert torch.equal(logits_of(load_parts(path, (1, 2), KINDS), ids, mask), expected)


def test_an_expert_that_is_missing_is_found_out(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_models["mixtral"]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SettingError, match=r"experts\.gate_up_proj has pieces of 4 and 2 experts"):
        check_checkpoint(tmp_path)


def test_loaded_in_float32_whatever_the_file_has(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    whole = load_whole(tiny_models["gpt2"])
    whole.half().save_pretrained(tmp_path)
    (trunk,) = load_parts(tmp_path, (1, 2), ["trunk"])
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_whole(tmp_path).parameters()} == {torch.float32}


def test_shards_and_names_without_prefix_are_read(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Old checkpoints of GPT-2 lack the decoder's name; large ones come in several files."""
    from safetensors.torch import load_file, save_file

    source = tiny_models["gpt2"]
    load_whole(source).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, bare / "model.safetensors"
    )
    ids, mask, _ = batch_of("none")
    expected = logits_of(load_parts(source, (1, 2), KINDS), ids, mask)
    for folder in (tmp_path / "shards", bare):
        assert torch.equal(logits_of(load_parts(folder, (1, 2), KINDS), ids, mask), expected)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("vocab_size", 10, r"has the shape \[97, 32\], config.json says \[10, 32\]"),
        ("num_hidden_layers", 9, "the checkpoint has no tensor model.layers.3"),
        ("hidden_act", "none", "belong together"),
    ],
)
def test_a_configuration_that_is_not_the_checkpoints_is_refused(
    tmp_path: Path, tiny_models: dict[str, Path], setting: str, value: object, message: str
) -> None:
    source = tiny_models["llama"]
    check_checkpoint(source)
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    document = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {setting: value}))
    with pytest.raises(SettingError, match=message):
        check_checkpoint(tmp_path)
