"""The library `datasets` of Hugging Face: imports it when it is needed, and opens data sets with it."""

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

if TYPE_CHECKING:
    pass


def is_saved(path: Path) -> bool:
    """Tells whether `datasets.save_to_disk` wrote a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Endings of the files that can be read, with the name that `datasets` has for each format."""

_PATTERN = re.compile(r"[*?\[\]]|::")
"""Characters of a path that `datasets` mistakes for a pattern, or for a path inside of an archive."""


@contextlib.contextmanager
def without_patterns(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields a path at which `datasets` finds the files of `path`, and the cache folder to use.

    If a file's name looks like a pattern, the path is a temporary folder of links and the cache is temporary, too.
    Otherwise these are the path itself and None, the default cache.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if not any(_PATTERN.search(str(file.absolute())) for file in files):
        yield path, None
        return
    with tempfile.TemporaryDirectory(prefix="fedsplit-") as folder:
        root = Path(folder) / "data"
        for number, file in enumerate(files):
            inner = file.relative_to(path).parts if path.is_dir() else (file.name,)
            link = root.joinpath(*(_PATTERN.sub("_", name) for name in inner))
            if link.exists():  # two names differ only in the characters that were replaced
                link = link.with_name(f"{link.stem}_{number}{link.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())
        yield root if path.is_dir() else link, str(Path(folder) / "cache")


def quiet_datasets() -> ModuleType:
    """Imports `datasets` and silences it. The import takes seconds, and the bundled corpus does not need it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the class names of each column whose type in `datasets` has them."""
    return {column: list(feature.names) for column, feature in features.items() if hasattr(feature, "names")}


def load(dataset: str, path: Path, data: DataSettings, cache: str | None = None) -> Dataset:
    """Reads a data set by `datasets`, as a `datasets.Dataset`."""
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
