"""Opens data sets with the library `datasets` of Hugging Face. The library is imported when a data set needs it."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedsplit.settings.sections import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset


def is_saved(path: Path) -> bool:
    """Returns True if `datasets.save_to_disk` wrote a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Endings of readable files, with the name of each format in `datasets`."""

_PATTERN = re.compile(r"[*?\[\]]|::")
"""Characters of a path that `datasets` mistakes for a pattern, or for a path inside of an archive."""


@contextlib.contextmanager
def without_patterns(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Makes a path readable for `datasets`, which would take special characters in names for a pattern.

    Yields:
        The path to read, and the folder of the cache. For a file name like a pattern: a temporary folder of links, and
        a temporary cache. Otherwise: the path itself, and None for the default cache.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    # The whole path, since `datasets` would take a folder's name for a pattern, too.
    if not any(_PATTERN.search(str(file.absolute())) for file in files):
        yield path, None
        return
    with tempfile.TemporaryDirectory(prefix="fedsplit-") as folder:
        root = Path(folder) / "data"
        for number, file in enumerate(files):
            names = file.relative_to(path).parts if path.is_dir() else (file.name,)
            link = root.joinpath(*(_PATTERN.sub("_", name) for name in names))
            if link.exists():  # two names differ only in the characters that were replaced
                link = link.with_name(f"{link.stem}_{number}{link.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())
        yield root if path.is_dir() else link, str(Path(folder) / "cache")


def quiet_datasets() -> ModuleType:
    """Imports `datasets`, which takes seconds, and silences the library."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the class names of columns with class numbers, by column.

    Args:
        features: Types of the columns, in the types of `datasets`.
    """
    names = {}
    for column, feature in features.items():
        if hasattr(feature, "names"):  # a `ClassLabel`
            names[column] = list(feature.names)
    return names


def load(
    dataset: str,
    path: Path,
    data: DataSettings,
    cache: str | None = None,
) -> Dataset:
    """Reads a data set.

    Args:
        dataset: Path of a folder, or name on the Hub.
        path: The name as a path, for a file or a folder.
        data: Configuration and split.
        cache: Folder of the library's cache; None for the default.

    Raises:
        ValueError: A saved data set lacks the configuration or the split. The library raises many further errors.
    """
    datasets = quiet_datasets()
    if path.is_dir() and is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            if data.split != "train" or data.config:
                raise ValueError("it has neither splits nor configurations")
            return saved
        if data.config or data.split not in saved:
            raise ValueError(f"its splits are {', '.join(saved)}, and it has no configurations")
        return saved[data.split]

    if path.is_file():
        kind = FILE_TYPES[path.suffix]
        return datasets.load_dataset(kind, data_files=str(path), split=data.split, cache_dir=cache)
    return datasets.load_dataset(dataset, data.config or None, split=data.split, cache_dir=cache)
