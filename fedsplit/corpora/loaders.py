"""Data sets from a user's own function, by name: `--dataset path/to/mine.py:load`, or `--dataset module:load`."""

from __future__ import annotations

import re
from os.path import exists  # False where `Path.exists` would raise an error, as for a name that is too long
from pathlib import Path

from fedsplit.corpora.data_table import Table, as_table
from fedsplit.corpora.given import FORMS, as_dataset
from fedsplit.errors import SettingError
from fedsplit.loading import Kind, file_of, find, name_of
from fedsplit.settings.sections import DataSettings

LOADER = Kind(
    setting="dataset",
    builtin=lambda: {},
    allowed="path/to/mine.py:load, or module:load, of a function without arguments",
    functions=True,
)
"""Functions that return a data set, for `--dataset`."""

_NAME = re.compile(r"(.+\.py|\w+(\.\w+)*):\w+")


def is_loader(dataset: str) -> bool:
    """Returns True if the name of a data set stands for a function. A file or folder of the name takes precedence.

    Example:
        >>> is_loader("path/to/mine.py:load"), is_loader("my_project.data:load"), is_loader("wikitext")
        (True, True, False)
    """
    return bool(_NAME.fullmatch(dataset)) and not exists(dataset)


def path_of(dataset: str) -> Path:
    """Returns the path that the name of a data set refers to: of the data, or of the file with a user's function.

    A name that refers to no path, such as `sotu`, is returned as a path that does not exist.

    Example:
        >>> path_of("path/to/mine.py:load"), path_of("notes.jsonl")
        (PosixPath('path/to/mine.py'), PosixPath('notes.jsonl'))
    """
    file = file_of(dataset) if is_loader(dataset) else None
    return file or Path(dataset)


def check_loader(dataset: str, data: DataSettings) -> None:
    """Checks that there is such a function, without calling the function.

    Args:
        dataset: Name of the function.
        data: Configuration and split.

    Raises:
        SettingError: There is no such function, or the settings ask for a configuration.
    """
    find(LOADER, dataset)
    if data.config:
        raise SettingError("data.config", data.config, f"none, since {dataset} has no configurations")


def read_loader(dataset: str, data: DataSettings) -> Table:
    """Calls a function, and returns the data set as a table.

    Args:
        dataset: Name of the function, which returns one of the forms in `fedsplit.corpora.given.FORMS`.
        data: The split, of a function that returns a `DatasetDict`.

    Raises:
        SettingError: There is no such function, the function fails, or the result is no data set.
    """
    import datasets

    load = find(LOADER, dataset)
    try:
        loaded = load()
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        words = f"a function that returns a data set ({type(error).__name__}: {error})"
        raise SettingError("dataset", dataset, words) from error
    try:
        rows = as_dataset(loaded, FORMS)
    except SettingError as error:
        raise SettingError("dataset", dataset, f"a function that returns {FORMS} ({error.value})") from error
    if isinstance(rows, datasets.DatasetDict):
        if data.split == "all":
            rows = datasets.concatenate_datasets(list(rows.values()))
        elif data.split in rows:
            rows = rows[data.split]
        else:
            raise SettingError("data.split", data.split, f"all | {' | '.join(rows)}, the splits of {dataset}")
    elif data.split != "train":
        raise SettingError("data.split", data.split, f"train, since {dataset} has no other split")
    return as_table(dataset, name_of(dataset), rows)
