"""The split model is the unsplit model: values and gradients, at every cut, with any padding."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS, VOCABULARY
from peft import get_peft_model
from safetensors import safe_open

from fedsplit import adapters
from fedsplit.config import LoraSettings, SettingError
from fedsplit.split import check_checkpoint, load_parts, load_whole, ranges

CUTS = [cut for cut in itertools.product(range(BLOCKS + 1), repeat=2) if cut[0] < cut[1]]
KINDS = ("bottom", "trunk", "top")
PADDINGS = ("none", "left", "right")


def _batch(padding: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Tokens, mask and labels of three sequences."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=generator)
    if padding == "none":
        return ids, None, ids
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 1, 0)):
        if length and padding == "left":
            mask[row, :length] = 0
        elif length:
            mask[row, -length:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def _settings(dropout: float) -> LoraSettings:
    return LoraSettings(rank=3, alpha=5.0, dropout=dropout)


def _pair(path: Path, cut: tuple[int, int], dropout: float):
    """The parts, and the whole model under PEFT with the same adapters, none of them zero."""
    parts = load_parts(path, cut, KINDS)
    for part in parts:
        adapters.add(part, _settings(dropout), seed=0)
        for name, parameter in adapters.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    whole = get_peft_model(load_whole(path), adapters.lora_config(_settings(dropout), parts[0].family))
    given = adapters.read(*parts).tensors
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    trained = {n: p for n, p in names.items() if p.requires_grad}
    assert trained.keys() == given.keys()
    for name, parameter in trained.items():
        parameter.data = given[name].clone()
    return parts, whole, trained


def _chain(parts, ids, mask):
    bottom, trunk, top = parts
    return top.logits(trunk(bottom(ids, mask), mask), mask)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cut", CUTS)
def test_split_equals_unsplit_bit_for_bit(model_path: Path, cut: tuple[int, int], padding: str) -> None:
    """Logits, loss and the gradient of every adapter parameter, dropout off."""
    ids, mask, labels = _batch(padding)
    parts, whole, trained = _pair(model_path, cut, dropout=0.0)
    whole.eval()
    reference = whole(input_ids=ids, attention_mask=mask, labels=labels)
    reference.loss.backward()
    bottom, trunk, top = parts
    assert torch.equal(_chain(parts, ids, mask), reference.logits)
    loss = top(trunk(bottom(ids, mask), mask), labels, mask)
    assert torch.equal(loss, reference.loss)
    loss.backward()
    compared = 0
    for part in parts:
        for name, parameter in adapters.parameters(part).items():
            assert torch.equal(parameter.grad, trained[name].grad), name
            assert parameter.grad.abs().max() > 0, name
            compared += 1
    assert compared == len(trained)


@pytest.mark.parametrize("cut", [(0, BLOCKS), (1, 2), (2, 3)])
def test_with_dropout_equal_under_the_same_random_state(model_path: Path, cut: tuple[int, int]) -> None:
    """The reference runs without a cache of keys: a cache changes the layout, and with it the last bit."""
    ids, _, labels = _batch("none")
    parts, whole, trained = _pair(model_path, cut, dropout=0.3)
    for module in (*parts, whole):
        module.train()
    torch.manual_seed(11)
    reference = whole(input_ids=ids, labels=labels, use_cache=False).loss
    reference.backward()
    torch.manual_seed(11)
    bottom, trunk, top = parts
    loss = top(trunk(bottom(ids)), labels)
    loss.backward()
    assert torch.equal(loss, reference)
    for part in parts:
        for name, parameter in adapters.parameters(part).items():
            assert torch.equal(parameter.grad, trained[name].grad), name
    torch.manual_seed(12)
    assert not torch.equal(top(trunk(bottom(ids)), labels), reference)


@pytest.mark.parametrize("cut", CUTS)
def test_a_part_holds_its_own_weights_and_no_others(model_path: Path, cut: tuple[int, int]) -> None:
    with safe_open(model_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    seen: dict[str, str] = {}
    for part in load_parts(model_path, cut, KINDS):
        for name, parameter in part.named_parameters():
            whole = part.whole_name(name)
            assert not parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert whole not in seen, f"{whole} is in {seen[whole]} and in {part.kind}"
            seen[whole] = part.kind
            if whole in stored:
                assert torch.equal(parameter, stored[whole])
    assert stored.keys() <= seen.keys()
    blocks = {kind: len(numbers) for kind, numbers in ranges(BLOCKS, cut).items()}
    assert sum(blocks.values()) == BLOCKS


def test_a_tied_head_is_the_embedding_itself(tiny_models: dict[str, Path]) -> None:
    bottom, top = load_parts(tiny_models["gpt2"], (1, 2), ("bottom", "top"))
    assert top.lm_head.weight is bottom.transformer.wte.weight
    bottom, top = load_parts(tiny_models["llama"], (1, 2), ("bottom", "top"))
    assert top.lm_head.weight is not bottom.model.embed_tokens.weight


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
    ids, mask, _ = _batch("none")
    expected = _chain(load_parts(source, (1, 2), KINDS), ids, mask)
    for folder in (tmp_path / "shards", bare):
        assert torch.equal(_chain(load_parts(folder, (1, 2), KINDS), ids, mask), expected)


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


@pytest.mark.parametrize("cut", [(0, 0), (2, 1), (1, BLOCKS + 1)])
def test_an_impossible_cut_is_refused(model_path: Path, cut: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside a model of 3 blocks"):
        load_parts(model_path, cut, KINDS)
