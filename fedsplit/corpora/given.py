"""Data sets as Python objects: texts by client, rows, or a data set of the library `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedsplit.errors import SettingError, described

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FORMS = "a datasets.Dataset or DatasetDict, a dict of lists of texts by client, or a list of dicts of values by column"
"""All forms of a data set, in words."""


def as_dataset(given: object, allowed: str = FORMS) -> Dataset | DatasetDict:
    """Returns an object as a data set of the library `datasets`.

    Args:
        given: The object, in one of the forms in `FORMS`.
        allowed: All that the setting allows, for messages.

    Raises:
        SettingError: The object has another form, holds no text, or has a transform, which no file can hold.

    Example:
        >>> as_dataset({"ann": ["one", "two"], "bob": ["three"]}).to_dict()
        {'text': ['one', 'two', 'three'], 'owner': ['ann', 'ann', 'bob']}
        >>> as_dataset([{"prompt": "1 + 1 =", "completion": " 2"}]).column_names
        ['prompt', 'completion']
    """
    import datasets

    if isinstance(given, Mapping) and not isinstance(given, datasets.DatasetDict):
        given = datasets.Dataset.from_dict(_columns_by_client(given, allowed))
    elif isinstance(given, list | tuple):
        given = _of_rows(given, allowed)
    if not isinstance(given, datasets.Dataset | datasets.DatasetDict):
        raise SettingError("dataset", described(given), allowed)
    splits = given.values() if isinstance(given, datasets.DatasetDict) else [given]
    if any(split.format["type"] == "custom" for split in splits):  # files cannot hold the transform's code
        raise SettingError("dataset", "one with a transform", f"{allowed}; map() applies a transform for good")
    return given


def _columns_by_client(texts: Mapping[Any, Any], allowed: str) -> dict[str, list[str]]:
    """Converts texts by client to the columns `text` and `owner`.

    Raises:
        SettingError: A client's name is no text, a client's value is no list of texts, or there is no text.
    """
    columns: dict[str, list[str]] = {"text": [], "owner": []}
    for client, texts_of_client in texts.items():
        is_list = isinstance(texts_of_client, list | tuple)
        is_list_of_texts = is_list and all(isinstance(text, str) for text in texts_of_client)
        if not isinstance(client, str) or not is_list_of_texts:
            raise SettingError("dataset", f"{described(texts_of_client)} for the client {client!r}", allowed)
        columns["text"] += texts_of_client
        columns["owner"] += [client] * len(texts_of_client)
    if not columns["text"]:
        raise SettingError("dataset", "a dict without a text", allowed)
    return columns


def _of_rows(rows: list[Any] | tuple[Any, ...], allowed: str) -> Dataset:
    """Converts rows to a data set. A column that a row lacks is empty in that row.

    Raises:
        SettingError: There is no row, a row is no dict with texts as keys, or two values of a column do not fit.
    """
    import datasets

    if not rows:
        raise SettingError("dataset", "a list without a row", allowed)
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise SettingError("dataset", f"{described(row)} as row {number}", allowed)
        columns |= {name: [] for name in row if name not in columns}
    for name, values in columns.items():
        values += [row.get(name) for row in rows]
    try:
        return datasets.Dataset.from_dict(columns)
    except (ValueError, TypeError) as error:  # of Arrow, whose columns have one type each
        words = f"{allowed}, in which all values of a column have one type ({error})"
        raise SettingError("dataset", "a list of dicts", words) from error
