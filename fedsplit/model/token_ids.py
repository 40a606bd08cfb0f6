"""Token ids: the ids that end a text, and the ids for which the embedding has a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsplit.errors import SettingError
from fedsplit.model.vocabulary import has_vocabulary, load_tokenizer

_END = "eos_token_id"

_FILES = ("generation_config.json", "config.json")
"""Files that may name the end tokens. The first file with an end token counts, as in transformers' generation."""


def end_tokens(folder: Path) -> list[int]:
    """Returns the ids of the tokens that end a text, for training, evaluation and generation alike.

    The ids come from generation_config.json, else from config.json, else from the tokenizer. Training appends the
    first id to each text. Generation stops at any id.

    Args:
        folder: Folder of the model.

    Returns:
        The ids; empty if no file has an end token.

    Raises:
        SettingError: A file cannot be read, or has an end token that is no token id.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> end_tokens(BUNDLED_MODEL)
        [0]
    """
    for name in _FILES:
        document = _read(folder / name)
        value = document.get(_END, text_part(document).get(_END))
        if value in (None, []):  # null names no token; transformers then looks further
            continue
        ids: list[Any] = value if isinstance(value, list) else [value]
        if not all(map(_is_id, ids)):
            allowed = f"a model whose {_END} is the id of a token, a list of ids, or null"
            raise SettingError("model", f"{folder} (its {name} has the {_END} {json.dumps(value)})", allowed)
        return ids
    end = load_tokenizer(folder).eos_token_id if has_vocabulary(folder) else None
    return [] if end is None else [int(end)]


def _is_id(value: Any) -> bool:
    """Returns True for a value that can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def end_token(folder: Path) -> int:
    """Returns the id of the token that training appends to each text: the first of `end_tokens`.

    Raises:
        SettingError: The model has no end token.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> end_token(BUNDLED_MODEL)
        0
    """
    ids = end_tokens(folder)
    if ids:
        return ids[0]
    where = f"no {_END} in {' or '.join(_FILES)}, and no end token in its tokenizer"
    raise SettingError("model", f"{folder} ({where})", "a model that says which token ends a text")


def check_largest(folder: Path, model: str, largest: int) -> None:
    """Checks that a model's embedding has a row for every token of some texts.

    Args:
        folder: Folder of the model.
        model: Name of the model, for the error.
        largest: Largest token id in the texts, including end tokens and padding.

    Raises:
        SettingError: The embedding has fewer rows.
    """
    rows = embedding_rows(folder)
    if largest < rows:
        return
    notes = []
    name = _token_name(folder, largest) if has_vocabulary(folder) else None
    if name:
        notes.append(name)
    if largest in end_tokens(folder):
        notes.append(_END)
    token = f"token {largest}" + (f" ({', '.join(notes)})" if notes else "")
    allowed = f"a model whose embedding has a row for each token: ids 0 to {rows - 1}, or more rows"
    raise SettingError("model", f"{model} (its texts have {token}, its embedding has {rows} rows)", allowed)


def embedding_rows(folder: Path) -> int:
    """Returns the number of rows of a model's embedding.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> embedding_rows(BUNDLED_MODEL)
        1024
    """
    size = text_part(_read(folder / "config.json")).get("vocab_size")
    if isinstance(size, int):
        return size
    # The import takes a second, and hardly any config.json leaves the size out.
    from fedsplit.model.derivation import text_config

    return int(text_config(folder).vocab_size)


def text_part(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of config.json that is about the text model: all of it, unless the text model is nested."""
    inner = document.get("text_config")
    return inner if isinstance(inner, dict) else document


def _token_name(folder: Path, token: int) -> str | None:
    """Returns the text of a token; None if the tokenizer has no such token."""
    tokenizer = load_tokenizer(folder)
    if token >= len(tokenizer):
        return None
    name: str | None = tokenizer.convert_ids_to_tokens(token)
    return name


def _read(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Returns an empty object for a missing file.

    Raises:
        SettingError: The file holds no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict):
        raise SettingError("model", f"{file.parent} (its {file.name} cannot be read)", "a JSON object in that file")
    return document
