"""A model's tokenizer, from whichever files it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.allowed import SettingError
from fedsplit.config import BUNDLED_MODEL
from fedsplit.model import vocabulary
from fedsplit.model.vocabulary import has_vocabulary, load_tokenizer, open_tokenizer

TEXT = "Fellow citizens: naïve café, 你好 \n\t 🦅 <|endoftext|> 1946"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The bundled tokenizer as vocab.json and merges.txt, as GPT-2's first checkpoints have it."""
    model = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    shutil.copy(BUNDLED_MODEL / "config.json", tmp_path)
    return tmp_path


def test_older_files_give_the_same_tokens(older: Path) -> None:
    assert not (older / "tokenizer.json").exists()
    assert open_tokenizer(older).whole([TEXT]) == open_tokenizer(BUNDLED_MODEL).whole([TEXT])


def test_the_ready_file_goes_first(older: Path) -> None:
    tokenizer = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    (older / "vocab.json").write_text("{}")
    (older / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(open_tokenizer(older).library) == 1024


def test_a_folder_without_any_is_refused_and_never_given_an_empty_one(tmp_path: Path) -> None:
    shutil.copy(BUNDLED_MODEL / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert not has_vocabulary(tmp_path)
    with pytest.raises(SettingError, match=r"no tokenizer in it\) is not possible; allowed: a folder with a tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SettingError, match=r"^model: ") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


CLASSES = {"llama": "LlamaTokenizer", "gemma2": "GemmaTokenizer"}


@pytest.mark.parametrize("family", CLASSES)
def test_a_tokenizer_model_alone_gives_the_tokens_of_sentencepiece(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    pieces = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join([TEXT, "the people of the states, and the peace of the world"] * 9))
    facts = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "character_coverage": 1.0}
    if family == "gemma2":  # these leave texts as they are
        facts |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1}
        facts |= {"bos_id": 2, "unk_id": 3, "normalization_rule_name": "identity"}
    trainer = pieces.SentencePieceTrainer
    trainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), minloglevel=9, **facts)
    shutil.copy(tiny_models[family] / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": CLASSES[family]}))
    text = "the peace of the states: naïve 🦅 1946"
    expected = pieces.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert len(expected) > 10
    assert open_tokenizer(tmp_path).written([text]) == [expected]
    assert load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("read", [open_tokenizer, load_tokenizer])
def test_a_tokenizer_model_without_its_library_says_what_to_install(
    read: Callable[[Path], object], tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that transformers would name is another one."""
    shutil.copy(tiny_models["llama"] / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"torn")
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    words = r"^model: .* \(its tokenizer.model cannot be read; .* pip install 'fedsplit\[sentencepiece\]'\) is not"
    with pytest.raises(SettingError, match=words) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
