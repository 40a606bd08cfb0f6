"""Reads data sets of all sources as tables: the bundled corpus, the synthetic language, files, folders and the Hub."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.corpora.corpus import FIRST_CLIENT_YEAR, sotu
from fedsplit.corpora.data_table import Table, as_table, count_rows
from fedsplit.corpora.datasets_library import (
    FILE_TYPES,
    class_names,
    is_saved,
    load,
    quiet_datasets,
    without_patterns,
)
from fedsplit.corpora.files import READ_HERE, Columns, doubled_columns, read_rows, read_text
from fedsplit.corpora.loaders import check_loader, is_loader, read_loader
from fedsplit.corpora.synthetic import make_rows
from fedsplit.errors import SettingError
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.sections import DataSettings

if TYPE_CHECKING:
    from datasets import ClassLabel, DatasetBuilder

MADE = ("sotu", "synthetic")
"""Data sets that fedsplit contains or generates."""

ALLOWED = (
    f"sotu, synthetic, a Hub id such as wikitext, a file that is there, ending in {' | '.join(FILE_TYPES)}, "
    "a folder of such files or of datasets.save_to_disk, or path/to/mine.py:load"
)


_ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files beside the data that hold no data, and that `datasets` ignores."""

_LAYOUT = re.compile(r"---\n(?:(?!---).*\n)*?configs:")
"""Beginning of a README.md that names the files with the data, as on the Hub."""


def check_dataset(dataset: str, data: DataSettings | None = None) -> None:
    """Checks that a data set can exist, without reading its files or asking the Hub.

    Args:
        dataset: Name of the data set in the settings.
        data: Configuration and split.

    Raises:
        SettingError: The name is no bundled data set, no existing file of a known type, no existing folder and no
            possible name on the Hub; or the data set cannot have the configuration or the split; or the folder has
            files of several types (`datasets` would read only one type).

    Example:
        >>> check_dataset("synthetic")
        >>> check_dataset("notes.pdf")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fedsplit.errors.SettingError: dataset: notes.pdf is not possible; allowed: sotu, synthetic, ...
    """
    data = data or DataSettings()
    path = Path(dataset)
    if is_loader(dataset):
        check_loader(dataset, data)
    elif dataset in MADE or path.is_file():
        if dataset not in MADE and path.suffix not in FILE_TYPES:
            raise SettingError("dataset", dataset, ALLOWED)
        if data.config:
            raise SettingError("data.config", data.config, f"none, since {dataset} has no configurations")
        if dataset in MADE and data.split != "train":
            raise SettingError("data.split", data.split, f"train, since {dataset} has no other split")
    elif path.is_dir():
        if not (is_saved(path) or _data_files(path)):
            raise SettingError("dataset", f"{dataset} (no data files in it)", ALLOWED)
        _check_kind(dataset, path)
    elif not _may_be_on_hub(dataset):
        raise SettingError("dataset", dataset, ALLOWED)


def check_packing(data: DataSettings) -> None:
    """Checks that the format allows packing.

    Raises:
        SettingError: The settings ask to pack classified texts or pairs. A sequence then has a single text.

    Example:
        >>> check_packing(DataSettings(format="text", packing="true"))
    """
    if data.format in ("classification", PAIRS) and data.packing == "true":
        allowed = f"auto | false under the format {data.format}, where a text is a sequence"
        raise SettingError("data.packing", "true", allowed)


def _may_be_on_hub(dataset: str) -> bool:
    """Returns True if a name has the form of a Hub id, such as `user/name`, and not the form of a file's name."""
    # A misspelt name of a file must not be looked up on the Hub.
    ends_like_a_file = re.search(r"\.[a-z]{2,8}$", dataset)
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", dataset)) and not ends_like_a_file


def is_on_hub(dataset: str) -> bool:
    """Returns True for a data set of the Hub: not a bundled one, and no file or folder.

    Example:
        >>> is_on_hub("wikitext"), is_on_hub("sotu")
        (True, False)
    """
    return dataset not in MADE and not Path(dataset).exists() and _may_be_on_hub(dataset)


def _data_files(path: Path) -> list[Path]:
    """Returns the files of known types in a folder, in alphabetical order: the system's order differs by disk."""
    named = [file for file in path.rglob("*") if file.suffix in FILE_TYPES]
    return sorted(file for file in named if file.is_file())


def _check_kind(dataset: str, path: Path) -> None:
    """Checks that all data files of a folder have one type: `datasets` would read the most frequent type alone.

    Raises:
        SettingError: The files have several types, and no README.md names the files to read.
    """
    if is_saved(path) or _readme_names_files(path):
        return

    # The first file of each type, except for files that `datasets` ignores.
    examples: dict[str, Path] = {}
    for absolute in _data_files(path):
        file = absolute.relative_to(path)
        is_hidden = any(step.startswith((".", "__")) for step in file.parts)
        if file.name not in _ABOUT and not is_hidden:
            examples.setdefault(FILE_TYPES[file.suffix], file)

    if len(examples) > 1:
        first, second, *_ = examples.values()
        needed = f"a folder whose data files are of one kind ({first} and {second} are of two)"
        raise SettingError("dataset", dataset, needed)


def _readme_names_files(path: Path) -> bool:
    """Returns True if a folder's README.md names the files that hold the data."""
    readme = path / "README.md"
    if not readme.is_file():
        return False
    text = readme.read_text(encoding="utf-8", errors="replace")
    return _LAYOUT.match(text) is not None


def read_table(
    dataset: str,
    data: DataSettings,
    *,
    seed: int = 0,
    owners: int = 8,
) -> Table:
    """Reads a data set as a table.

    Args:
        dataset: "sotu" for the addresses from 1946 on, "synthetic", a path, a Hub id, or the name of a function.
        data: Configuration and split.
        seed: Seed of a synthetic data set.
        owners: Number of owners of a synthetic data set.

    Raises:
        SettingError: The data set cannot be found or read, or has no row.

    Example:
        >>> table = read_table("synthetic", DataSettings(), owners=2)
        >>> len(table), sorted(set(table.columns["owner"]))
        (64, ['owner 0', 'owner 1'])
    """
    check_dataset(dataset, data)
    path = Path(dataset)
    if dataset == "sotu":
        addresses = sotu(first_year=FIRST_CLIENT_YEAR)
        texts = [address.text for address in addresses]
        presidents = [address.owner for address in addresses]
        return Table(dataset, dataset, {"text": texts, "owner": presidents})
    if dataset == "synthetic":
        rows = make_rows(seed, owners)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return Table(dataset, dataset, columns)
    try:
        if is_loader(dataset):
            table = read_loader(dataset, data)
        else:
            table = _read_local(dataset, path, data) if path.exists() else _read_hub(dataset, data)
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # the library raises a dozen types, among them the Hub's and the network's
        raise SettingError("dataset", dataset, f"{_kind(path)} ({_reason(error, path)})") from None
    if not len(table):
        raise SettingError("dataset", dataset, "a data set with at least one row (it is empty)")
    return table


def read_held_out(dataset: str, data: DataSettings) -> Table:
    """Reads the separate held-out data in `--data.held-out`.

    Args:
        dataset: Name of the training data set.
        data: The settings. `data.held_out` is the path of an existing file or folder, or else a split of `dataset`.

    Raises:
        SettingError: Neither a path nor a split has the name.
    """
    if Path(data.held_out).exists():
        try:
            # The split and the configuration in the settings are those of the training data.
            return read_table(data.held_out, dataclasses.replace(data, split="train", config=""))
        except SettingError as error:
            raise SettingError("data.held_out", data.held_out, error.allowed) from None
    if dataset in MADE or Path(dataset).is_file():
        needed = f"a file or folder that is there, since {dataset} has one split only"
        raise SettingError("data.held_out", data.held_out, needed)
    return read_table(dataset, dataclasses.replace(data, split=data.held_out))


def _read_local(dataset: str, path: Path, data: DataSettings) -> Table:
    """Reads a file or a folder. For a folder, `datasets` finds the files of each split."""
    is_text_file = path.is_file() and path.suffix == ".txt"
    # `datasets` would make each line of a text file a text.
    if is_text_file or _is_folder_of_texts(path, data):
        files = {"train": [path] if is_text_file else _data_files(path)}
        columns = _of_split(files, data.split, lambda paths: _texts(path, paths))
        return Table(dataset, path.stem, columns)

    if path.is_file() and path.suffix in READ_HERE:  # without `datasets`, whose import takes seconds
        return _table_of_rows(dataset, path.stem, {"train": [path]}, data)

    datasets = quiet_datasets()
    with without_patterns(path) as (plain, cache):
        if plain.is_dir() and not is_saved(plain):
            builder = datasets.load_dataset_builder(str(plain), data.config or None)
            files = _files_read_here(builder)
            if files:
                return _table_of_rows(dataset, path.stem, files, data, builder.info.features or {})
        return as_table(dataset, path.stem, load(str(plain), plain, data, cache))


def _is_folder_of_texts(path: Path, data: DataSettings) -> bool:
    """Returns True if a folder holds text files alone, without a README.md or settings for `datasets`."""
    if not path.is_dir() or is_saved(path):
        return False
    if data.config or (path / "README.md").exists():
        return False
    return all(file.suffix == ".txt" for file in _data_files(path))


def _texts(root: Path, files: Sequence[Path]) -> Columns:
    """Reads each file as one text. The owner of a text is the name of the file's folder; in `root`, of the file."""
    texts = []
    owners = []
    for file in files:
        try:
            texts.append(read_text(file))
        except ValueError as error:
            raise SettingError("dataset", file, f"a text in UTF-8 ({error})") from None
        is_at_top = file == root or file.parent == root
        owners.append(file.stem if is_at_top else file.parent.name)
    return {"text": texts, "owner": owners}


def _table_of_rows(
    dataset: str,
    name: str,
    files: Mapping[str, Sequence[Path]],
    data: DataSettings,
    features: Mapping[str, Any] = {},
) -> Table:
    """Reads CSV or JSON files as a table.

    Args:
        dataset: Name of the data set in the settings.
        name: Name of the owner if no column tells the owners.
        files: Files of each split.
        data: The settings.
        features: Types of the columns by a README.md, in the types of `datasets`. Only class names are used.

    Raises:
        ValueError: A file cannot be read, or a class has no name.
    """
    classes = class_names(features)
    # A column with named classes may hold the names, which `_class_numbers` turns into numbers.
    number_columns = {data.label} - classes.keys()

    def read(paths: Sequence[Path]) -> Columns:
        columns = dict(read_rows(paths, number_columns))
        for name in classes.keys() & columns:
            columns[name] = _class_numbers(columns[name], features[name])
        return columns

    columns = _of_split(files, data.split, read)
    all_paths = [path for paths in files.values() for path in paths]
    classes_here = {column: classes[column] for column in classes.keys() & columns}
    return Table(dataset, name, columns, classes_here, doubled_columns(all_paths))


def _class_numbers(values: Sequence[Any], label: ClassLabel) -> list[int | None]:
    """Returns class numbers for values that are class names or numbers; None for a missing value."""
    return [None if value is None else label.encode_example(value) for value in values]


def _files_read_here(builder: DatasetBuilder) -> dict[str, list[Path]]:
    """Returns a folder's files by split, if `fedsplit.corpora.files` reads them as `datasets` would; else nothing.

    All files must be CSV or JSON. A README.md may set options of the reader, such as a delimiter, which only `datasets`
    knows. Types of columns do not matter: values are read as they are written.
    """
    config = builder.config
    splits = config.data_files or {}
    files = {}
    for split, paths in splits.items():
        files[str(split)] = [Path(str(path)) for path in paths]
    # The configuration that the library would make for the same files if no README.md set an option.
    plain_config = type(config)(
        name=config.name,
        version=config.version,
        data_dir=config.data_dir,
        data_files=config.data_files,
        description=config.description,
    )
    all_paths = [path for paths in files.values() for path in paths]
    are_readable = all(path.suffix in READ_HERE and path.is_file() for path in all_paths)
    return files if are_readable and config == plain_config else {}


def _of_split(
    files: Mapping[str, Sequence[Path]], split: str, read: Callable[[Sequence[Path]], Columns]
) -> dict[str, Sequence[Any]]:
    """Reads the columns of a split.

    Args:
        files: Files of each split.
        split: Name of a split, a part of a split such as train[:10%], or "all" for all splits in order.
        read: Function that reads files as columns.

    Raises:
        ValueError: There is no such split.
    """
    if split in files:
        return dict(read(files[split]))
    if split == "all":
        split = "+".join(files)

    # The library reads the specification, so that every form of a split has the library's meaning.
    datasets = quiet_datasets()
    by_split = {name: read(paths) for name, paths in files.items()}
    lengths = {name: count_rows(columns) for name, columns in by_split.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)

    names = dict.fromkeys(name for part in parts for name in by_split[part.splitname])
    # A column of one split alone is filled with None for the others.
    joined: dict[str, list[Any]] = {name: [] for name in names}
    for part in parts:
        columns = by_split[part.splitname]
        missing = [None] * lengths[part.splitname]  # for a column of further splits alone
        for name, values in joined.items():
            values += columns.get(name, missing)[part.from_ : part.to]
    return dict(joined)


def _read_hub(dataset: str, data: DataSettings) -> Table:
    path = Path(dataset)
    return as_table(dataset, path.stem, load(dataset, path, data))


def _kind(path: Path) -> str:
    """Returns the kind of data set that was expected at a path, for messages."""
    if path.is_file():
        return f"a {path.suffix} file that can be read"
    return "a folder that can be read" if path.is_dir() else "a data set of the Hub that can be reached"


def _reason(error: Exception, path: Path) -> str:
    """Returns in one line why a data set could not be read."""
    if isinstance(error, StopIteration) or (path.is_file() and not path.stat().st_size):
        return "it is empty"
    cause: BaseException = error
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        cause = error.__cause__  # the error itself tells no reason
    message = " ".join(str(cause).split()) or type(cause).__name__
    if message.endswith("corresponds to no data!"):
        return "it is empty"
    return message if len(message) <= 300 else f"{message[:300]}…"
