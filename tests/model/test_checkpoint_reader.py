"""Checkpoints: names of all kinds, shards, types, and what is damaged."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from split_models import batch_of, logits_of
from transformers import AutoModelForCausalLM

from fedsplit.errors import SettingError
from fedsplit.model import checkpoint_reader
from fedsplit.model.checkpoint_reader import check_checkpoint
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import empty_model, load_unsplit

KINDS = ("bottom", "trunk", "top")
HEADS = ("lm_head.weight", "embed_out.weight")


def edited(
    source: Path,
    folder: Path,
    edit: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    **says: object,
) -> Path:
    """Copies a model, with changed tensors and other words in config.json; None takes a word out."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text()) | says
    for key in (key for key, value in says.items() if value is None):
        del document[key]
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def behead(tensors: dict[str, torch.Tensor]) -> None:
    for name in HEADS:
        tensors.pop(name, None)


def check_same_as_the_library(folder: Path) -> None:
    """Compares the parts with the model that transformers loads from a folder, to the bit."""
    check_checkpoint(folder)
    ids, mask, _ = batch_of("left")
    expected = load_unsplit(folder)(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits_of(load_parts(folder, (1, 2), KINDS), ids, mask), expected)


_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_LIBRARY = {
    "gpt_neox": ("lm_head.weight",),
    "mixtral": ("mlp.gate.weight", *_EXPERTS),
    "qwen3_moe": _EXPERTS,
}
"""Ends of names in the library's classes that checkpoints of the family do not have."""


def test_tensors_are_read_under_the_librarys_names_and_under_the_checkpoints(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """Experts one by one and stacked; a head that the checkpoint calls otherwise."""
    ids, mask, _ = batch_of("left")
    for family, ends in _LIBRARY.items():
        source = tiny_models[family]
        with safe_open(source / "model.safetensors", framework="pt") as file:
            assert not any(name.endswith(tuple(ends)) for name in file.keys())  # noqa: SIM118
        check_checkpoint(source)
        whole = load_unsplit(source)
        folder = tmp_path / family
        whole.save_pretrained(folder, save_original_format=False)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert all(any(name.endswith(end) for name in file.keys()) for end in ends)  # noqa: SIM118
        check_checkpoint(folder)
        expected = whole(input_ids=ids, attention_mask=mask).logits
        for path in (source, folder):
            assert torch.equal(logits_of(load_parts(path, (1, 2), KINDS), ids, mask), expected)


def test_an_expert_that_is_missing_is_found_out(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    source = tiny_models["mixtral"]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SettingError, match=r"experts\.gate_up_proj has pieces of 4 and 3 experts"):
        check_checkpoint(tmp_path)


def test_loaded_in_float32_whatever_the_file_has(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    whole = load_unsplit(tiny_models["gpt2"])
    whole.half().save_pretrained(tmp_path)
    check_checkpoint(tmp_path)
    (trunk,) = load_parts(tmp_path, (1, 2), ["trunk"])
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_unsplit(tmp_path).parameters()} == {torch.float32}


def test_shards_and_names_without_prefix_are_read(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Old checkpoints of GPT-2 lack the decoder's name; large ones come in several files."""
    source = tiny_models["gpt2"]
    load_unsplit(source).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
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
        ("pad_token_id", 97, "pad_token_id is 97, its embedding has 97 rows"),
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


@pytest.mark.parametrize("tied", [True, False, None])
def test_a_missing_head_is_the_embedding_exactly_where_the_library_ties_them(
    tied: bool | None, tmp_path: Path, any_model_path: Path
) -> None:
    """In every family; where config.json is silent, the default of its class decides."""

    folder = edited(any_model_path, tmp_path / "model", behead, tie_word_embeddings=tied)
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert (found["missing_keys"] == {"lm_head.weight"}) != bool(empty_model(folder).all_tied_weights_keys)
    assert tied is None or bool(found["missing_keys"]) != tied
    if not found["missing_keys"]:
        check_same_as_the_library(folder)
        return
    words = r"no tensor lm_head\.weight, and config\.json does not say that it is tied"
    with pytest.raises(SettingError, match=words):
        check_checkpoint(folder)
    with pytest.raises(ValueError, match=words):
        load_parts(folder, (1, 2), ["top"])


def test_a_head_of_its_own_is_kept_where_config_json_says_that_it_is_tied(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """As transformers, which ties only tensors of the same values."""
    torch.manual_seed(5)
    head = torch.randn(97, 32)
    folder = edited(tiny_models["qwen2"], tmp_path / "own", lambda tensors: tensors.update({"lm_head.weight": head}))
    assert torch.equal(load_parts(folder, (1, 2), ["top"])[0].lm_head.weight, head)
    check_same_as_the_library(folder)
    narrow = edited(folder, tmp_path / "narrow", lambda tensors: tensors.update({"lm_head.weight": head[:90].clone()}))
    with pytest.raises(SettingError, match=r"lm_head\.weight has the shape \[90, 32\], config.json says \[97, 32\]"):
        check_checkpoint(narrow)


def test_a_missing_embedding_is_the_head_that_it_is_tied_to(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """As in checkpoints that were saved under the head's name."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    folder = edited(tiny_models["qwen2"], tmp_path / "tied", rename)
    check_same_as_the_library(folder)
    bottom, top = load_parts(folder, (1, 2), ["bottom", "top"])
    assert top.lm_head.weight is bottom.decoder.embed_tokens.weight
    with pytest.raises(SettingError, match=r"no tensor model\.embed_tokens\.weight"):
        check_checkpoint(edited(folder, tmp_path / "own", tie_word_embeddings=False))
    bare = edited(folder, tmp_path / "bare", behead)
    with pytest.raises(SettingError, match=r"no tensor model\.embed_tokens\.weight"):
        check_checkpoint(bare)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mixtral"])
def test_tensors_that_no_part_uses_are_passed_over_as_by_the_library(
    family: str, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """A head of classes, a head of values, blocks beyond config.json's, buffers of old versions."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        more = {re.sub(r"(layers|h)\.1\.", r"\1.7.", name): tensor.clone() for name, tensor in tensors.items()}
        tensors.update({name: tensor for name, tensor in more.items() if name not in tensors})
        tensors.update(
            {"score.weight": torch.ones(5, 32), "v_head.bias": torch.ones(1), "rotary.inv_freq": torch.ones(4)}
        )

    check_same_as_the_library(edited(tiny_models[family], tmp_path / "more", add))


def test_one_tensor_under_two_names_is_refused(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Which one transformers takes depends on how the names sort."""

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 2

    def stack(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 32, 64)

    for family, edit, words in (
        ("llama", twice, r"one tensor twice, as embed_tokens\.weight and as model\.embed_tokens\.weight"),
        (
            "mixtral",
            stack,
            r"one tensor twice, as \S+block_sparse_moe\S+ and as \S+\.mlp\.experts\.down_proj",
        ),
    ):
        with pytest.raises(SettingError, match=words):
            check_checkpoint(edited(tiny_models[family], tmp_path / family, edit))


def test_a_classifier_needs_no_head_of_the_checkpoint(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Its own is drawn, whatever head the checkpoint has."""

    def as_classifier(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.ones(5, 32)

    folder = edited(tiny_models["llama"], tmp_path / "classifier", as_classifier)
    with pytest.raises(SettingError, match=r"no tensor lm_head\.weight"):
        check_checkpoint(folder)
    check_checkpoint(folder, classes=3)
    ids, _, _ = batch_of("none")
    bottom, trunk, top = load_parts(folder, (1, 2), KINDS, classes=3)
    whole = load_unsplit(folder, classes=3, pad=0)
    top.score.weight = whole.score.weight
    assert torch.equal(top.scores(trunk(bottom(ids))), whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", torch.float32),
        ("gpt2", "transformer.wte.weight", torch.bfloat16),
        ("llama", "lm_head.weight", torch.float16),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w2.weight", torch.float32),
        ("llama", "model.norm.weight", torch.float32),
        ("llama", "model.layers.0.self_attn.q_proj.weight", torch.float8_e5m2),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_name(
    value: float, family: str, name: str, dtype: torch.dtype, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value
        tensors[name] = tensors[name].to(dtype)

    folder = edited(tiny_models[family], tmp_path / "spoiled", spoil)
    words = rf"^model: .*\({name} in model\.safetensors holds values that are not finite\)"
    with pytest.raises(SettingError, match=words):
        check_checkpoint(folder)


def test_all_of_a_large_tensor_is_looked_at(tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: Any) -> None:
    """Also where it is read in many pieces."""
    monkeypatch.setattr(checkpoint_reader, "_AT_ONCE", 4 * 32 * 10)

    def spoil(row: int) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors["model.embed_tokens.weight"][row].fill_(math.nan)

    for row in (0, 50, 96):
        folder = edited(tiny_models["llama"], tmp_path / str(row), spoil(row))
        with pytest.raises(SettingError, match=r"embed_tokens\.weight in model\.safetensors holds values"):
            check_checkpoint(folder)


def test_a_value_beyond_the_type_of_the_run_is_refused(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """It would become an infinity where the weights are cast."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 3] = -70000.0

    folder = edited(tiny_models["llama"], tmp_path / "large", enlarge)
    for dtype in ("fp32", "bf16"):
        check_checkpoint(folder, dtype)
    with pytest.raises(SettingError, match=r"^dtype: fp16 is not possible; .* lm_head\.weight in model.* up to 70000"):
        check_checkpoint(folder, "fp16")
