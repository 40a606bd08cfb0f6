"""A model's folder to its tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fedsplit.allowed import SettingError

TOKENIZER_FILES = (
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "spiece.model",
    "sentencepiece*",
    "tekken.json",
    "tiktoken.model",
)
"""What lies beside a model for its tokenizer, by the names that transformers gives it."""

_READY = "tokenizer.json"

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece*")
"""What SentencePiece writes, by the names that transformers gives it; its own library reads it."""

_VOCABULARIES = (*_PIECES, "vocab.*", "tekken.json", "tiktoken.model")
"""Any of these is enough for transformers to make a tokenizer of; without any, it may make an empty one."""


def has_vocabulary(folder: Path) -> bool:
    """Whether there is anything in a folder that a tokenizer can be made of."""
    return (folder / _READY).is_file() or any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern))


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that lies beside a model: its tokenizer.json, or what transformers makes of older files.

    Args:
        folder: The model's.

    Raises:
        SettingError: There is none, or it cannot be read.
    """
    try:
        if (folder / _READY).is_file():
            return Tokenizer.from_file(str(folder / _READY))
        return _library_tokenizer(folder).backend_tokenizer
    except Exception as error:  # noqa: BLE001  # the libraries raise nothing narrower
        raise _refused(folder, error) from None


def load_tokenizer(path: Path) -> Any:
    """The library's tokenizer that lies beside a model.

    Raises:
        SettingError: There is none, or it cannot be read.
    """
    try:
        return _library_tokenizer(path)
    except Exception as error:  # noqa: BLE001  # the libraries raise nothing narrower
        raise _refused(path, error) from None


def _library_tokenizer(folder: Path) -> Any:
    if not has_vocabulary(folder):
        raise FileNotFoundError("no tokenizer in it")
    from transformers import AutoTokenizer  # takes a second to import, and most models do not need it

    return AutoTokenizer.from_pretrained(folder)


def _refused(folder: Path, error: Exception) -> SettingError:
    """What was wrong, in one line; transformers tells of another library where it lacks SentencePiece's."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    pieces = [file.name for pattern in _PIECES for file in sorted(folder.glob(pattern))]
    missing = find_spec("sentencepiece") is None or "tiktoken" in reason
    if pieces and missing and not (folder / _READY).is_file():
        reason = f"its {pieces[0]} cannot be read; SentencePiece's needs pip install 'fedsplit[sentencepiece]'"
    words = "a folder with a tokenizer.json that can be read, or another tokenizer that transformers opens"
    return SettingError("model", f"{folder} ({reason})", words)
