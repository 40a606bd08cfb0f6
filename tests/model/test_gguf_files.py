"""A GGUF file becomes a folder that is the model transformers reads from it, once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fedsplit.errors import SettingError
from fedsplit.model import gguf_files
from fedsplit.model.checkpoint_reader import check_checkpoint
from fedsplit.model.devices import TYPES
from fedsplit.model.facts import read_facts
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.model.vocabulary import open_tokenizer

pytest.importorskip("gguf")
from tiny_gguf import TOKENS, write_gguf

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedsplit"


def test_a_file_in_float32_is_the_model_it_was_made_from(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """To the bit; from the file's own words, whatever else lies beside it."""
    source = tiny_models["llama"]
    file = write_gguf(tmp_path / "tiny.gguf", source)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    folder = gguf_files.unpack(file, "fp32")
    check_checkpoint(folder)
    expected = load_unsplit(source)(input_ids=IDS).logits
    assert torch.equal(load_unsplit(folder)(input_ids=IDS).logits, expected)
    bottom, trunk, top = load_parts(folder, (1, 2), ["bottom", "trunk", "top"])
    assert torch.equal(top.logits(trunk(bottom(IDS))), expected)
    facts, original = read_facts(gguf_files.config_folder(file)), read_facts(source)
    assert facts == original


def test_a_file_without_a_head_is_a_model_whose_head_is_the_embedding(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """As transformers reads it, and llama.cpp writes it."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_models["llama"], without=["output.weight"])
    folder = gguf_files.unpack(file, "fp32")
    check_checkpoint(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True)
    )
    assert torch.equal(theirs.lm_head.weight, theirs.get_input_embeddings().weight)
    bottom, trunk, top = load_parts(folder, (1, 2), ["bottom", "trunk", "top"])
    assert torch.equal(top.logits(trunk(bottom(IDS))), theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_those_that_transformers_reads(
    tmp_path: Path, tiny_models: dict[str, Path], kind: str, dtype: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_models["llama"], kind)
    folder = gguf_files.unpack(file, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=TYPES[dtype], quantization_config=GgufConfig(dequantize=True)
    )
    mine = load_unsplit(folder, TYPES[dtype])
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine.get_parameter(name), parameter), name
    assert torch.equal(mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert not torch.equal(mine(input_ids=IDS).logits, load_unsplit(tiny_models["llama"])(input_ids=IDS).logits)


def test_the_tokenizer_comes_along(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = gguf_files.config_folder(write_gguf(tmp_path / "tiny.gguf", tiny_models["llama"]))
    (ids,) = open_tokenizer(folder).encode(["To the\nend<|endoftext|>"])
    assert [TOKENS[number] for number in ids] == [*"ToĠ", "th", *"eĊend", "<|endoftext|>"]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


def test_a_file_is_unpacked_once_and_anew_when_it_changes(
    tmp_path: Path, tiny_models: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_models["llama"])
    told: list[str] = []
    folder = gguf_files.unpack(file, "fp32", told.append)
    load = gguf_files._load
    monkeypatch.setattr(gguf_files, "_load", lambda *_: pytest.fail("it was unpacked again"))
    assert gguf_files.unpack(file, "fp32", told.append) == folder
    assert told == [f"unpacking {file} into {folder}"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["about", "float32"]
    monkeypatch.setattr(gguf_files, "_load", load)
    write_gguf(file, tiny_models["llama"], "Q8_0")
    os.utime(file, (1, 1))
    changed = gguf_files.unpack(file, "fp32")
    assert changed.parent != folder.parent and len([*cache.iterdir()]) == 2


def test_who_is_slower_takes_what_the_other_made(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, load = write_gguf(tmp_path / "tiny.gguf", tiny_models["llama"]), gguf_files._load

    def overtaken(folder: Path, dtype: torch.dtype) -> object:
        monkeypatch.setattr(gguf_files, "_load", load)
        gguf_files.unpack(file, "fp32")
        return load(folder, dtype)

    monkeypatch.setattr(gguf_files, "_load", overtaken)
    folder = gguf_files.unpack(file, "fp32")
    check_checkpoint(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["about", "float32"]


def test_what_cannot_be_unpacked_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_models: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_models["llama"]
    whole = write_gguf(tmp_path / "whole.gguf", source)
    (tmp_path / "text.gguf").write_text("GGML")
    (tmp_path / "head.gguf").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "torn.gguf").write_bytes(whole.read_bytes()[:-1000])
    write_gguf(tmp_path / "lacks.gguf", source, without=["blk.1.ffn_up.weight"])
    write_gguf(tmp_path / "falcon.gguf", source, architecture="falcon")
    write_gguf(tmp_path / "wavtokenizer-dec.gguf", source, architecture="wavtokenizer-dec")
    for name, words in (
        ("none", r"none\.gguf \(No such file or directory\)"),
        ("text", "it does not begin as a GGUF file does"),
        ("head", r"head\.gguf \("),
        ("torn", r"torn\.gguf \("),
        ("lacks", r"it has no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("falcon", r"falcon\.gguf \("),
        ("wavtokenizer-dec", "wavtokenizer-dec"),
    ):
        with pytest.raises(SettingError, match=words) as caught:
            gguf_files.unpack(tmp_path / f"{name}.gguf", "fp32")
        assert str(caught.value).startswith("model: ") and "\n" not in str(caught.value)
    assert {path.name for home in cache.iterdir() for path in home.iterdir()} == {"about"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"the package gguf is not installed\) .*pip install gguf"):
        gguf_files.unpack(whole, "fp32")
