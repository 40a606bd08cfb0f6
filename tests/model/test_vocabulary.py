"""A model's tokenizer, from whichever files it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsplit.allowed import SettingError
from fedsplit.config import BUNDLED_MODEL
from fedsplit.corpora.corpus import encode
from fedsplit.model.vocabulary import has_vocabulary, open_tokenizer

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
    assert encode([TEXT], older) == encode([TEXT], BUNDLED_MODEL)


def test_the_ready_file_goes_first(older: Path) -> None:
    tokenizer = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    (older / "vocab.json").write_text("{}")
    (older / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert open_tokenizer(older).get_vocab_size() == 1024


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
