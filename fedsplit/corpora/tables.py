"""Where data come from: the bundled corpus, the synthetic language, files, folders and the Hub, all as tables."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.allowed import SettingError
from fedsplit.config import DataSettings
from fedsplit.corpora.corpus import FIRST_CLIENT_YEAR, sotu
from fedsplit.corpora.files import READ_HERE, Columns, doubled_columns, read_rows, read_text
from fedsplit.corpora.synthetic import make_rows

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Files that can be read, and what `datasets` calls their format."""

MADE = ("sotu", "synthetic")
"""Data sets that are no files."""

ALLOWED = (
    f"sotu, synthetic, a Hub id such as wikitext, a file that is there, ending in {' | '.join(FILE_TYPES)}, "
    "or a folder of such files or of datasets.save_to_disk"
)


_ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that lie beside data and are none; `datasets` passes them over."""

_LAYOUT = re.compile(r"---\n(?:(?!---).*\n)*?configs:")
"""The beginning of a README.md that says, as on the Hub, which files are data."""


@dataclass(frozen=True)
class Table:
    """Rows of a data set, column by column.

    Attributes:
        dataset: What the user calls it.
        name: What its owner is called where no column says it.
        columns: Values by the columns' names.
        classes: The names of the classes, of columns that hold their numbers.
        doubled: Names that two columns share. Nobody knows which of the two a setting means.
    """

    dataset: str
    name: str
    columns: Mapping[str, Sequence[Any]]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    doubled: Collection[str] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def listed(self) -> str:
        """The columns' names, for messages."""
        return ", ".join(self.columns)

    def column(self, setting: str, name: str) -> Sequence[Any]:
        """A column.

        Args:
            setting: The setting that names it, for the message.
            name: Its name.

        Raises:
            SettingError: There is none of that name, or more than one.
        """
        if name not in self.columns:
            raise SettingError(setting, name, f"a column of {self.dataset}: {self.listed}")
        if name in self.doubled:
            raise SettingError(setting, name, f"a column whose name no other column of {self.dataset} has")
        return self.columns[name]


def check_dataset(dataset: str, data: DataSettings | None = None) -> None:
    """Makes sure that a data set can be found as far as that can be told without reading it or asking the Hub.

    Raises:
        SettingError: It is none that is made here, no file of a known type or folder that is there, and no name that
            the Hub might have; or one of these with a configuration or a split that it cannot have; or a folder of
            files of several kinds, of which all but one would be passed over.
    """
    data, path = data or DataSettings(), Path(dataset)
    if dataset in MADE or path.is_file():
        if dataset not in MADE and path.suffix not in FILE_TYPES:
            raise SettingError("dataset", dataset, ALLOWED)
        if data.config:
            raise SettingError("data.config", data.config, f"none, since {dataset} has no configurations")
        if dataset in MADE and data.split != "train":
            raise SettingError("data.split", data.split, f"train, since {dataset} has no other split")
    elif path.is_dir():
        if not (_is_saved(path) or _data_files(path)):
            raise SettingError("dataset", f"{dataset} (no data files in it)", ALLOWED)
        _check_kind(dataset, path)
    elif not _may_be_on_hub(dataset):
        raise SettingError("dataset", dataset, ALLOWED)


def check_packing(data: DataSettings) -> None:
    """Makes sure that what is to be packed can be.

    Raises:
        SettingError: A sequence has one class, so that it cannot have several texts.
    """
    if data.format == "classification" and data.packing == "true":
        words = "auto | false under the format classification, where a text is a sequence"
        raise SettingError("data.packing", "true", words)


def _may_be_on_hub(dataset: str) -> bool:
    ends_like_a_file = re.search(r"\.[a-z]{2,8}$", dataset)
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", dataset)) and not ends_like_a_file


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _data_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix in FILE_TYPES and file.is_file())


def _check_kind(dataset: str, path: Path) -> None:
    """Makes sure that no data file of a folder is passed over: `datasets` reads the kind that most of them are of.

    Raises:
        SettingError: There are several kinds, and nothing says which is meant.
    """
    readme = path / "README.md"
    if _is_saved(path) or (readme.is_file() and _LAYOUT.match(readme.read_text(encoding="utf-8", errors="replace"))):
        return
    kinds: dict[str, Path] = {}
    for file in (found.relative_to(path) for found in _data_files(path)):
        if file.name not in _ABOUT and not any(step.startswith((".", "__")) for step in file.parts):
            kinds.setdefault(FILE_TYPES[file.suffix], file)
    if len(kinds) > 1:
        one, two, *_ = kinds.values()
        words = f"a folder whose data files are of one kind ({one} and {two} are of two)"
        raise SettingError("dataset", dataset, words)


def read_table(dataset: str, data: DataSettings, *, seed: int = 0, owners: int = 8) -> Table:
    """Reads a data set.

    Args:
        dataset: "sotu" for the addresses from 1946 on, "synthetic", a path, or a Hub id.
        data: Its configuration and split.
        seed: Decides a synthetic one.
        owners: The owners of a synthetic one.

    Raises:
        SettingError: It cannot be found or read, or has no row.
    """
    check_dataset(dataset, data)
    path = Path(dataset)
    if dataset == "sotu":
        addresses = sotu(first_year=FIRST_CLIENT_YEAR)
        columns = {"text": [a.text for a in addresses], "owner": [a.owner for a in addresses]}
        return Table(dataset, dataset, columns)
    if dataset == "synthetic":
        rows = make_rows(seed, owners)
        return Table(dataset, dataset, {name: [row[name] for row in rows] for name in rows[0]})
    try:
        table = _read_local(dataset, path, data) if path.exists() else _read_hub(dataset, data)
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # the library raises a dozen kinds, the Hub's and the network's among them
        raise SettingError("dataset", dataset, f"{_kind(path)} ({_reason(error, path)})") from None
    if not len(table):
        raise SettingError("dataset", dataset, "a data set with at least one row (it is empty)")
    return table


def read_held_out(dataset: str, data: DataSettings) -> Table:
    """Reads the texts that are held out by `--data.held-out`: a path if there is such a one, else a split.

    Raises:
        SettingError: It is neither.
    """
    if Path(data.held_out).exists():
        try:
            return read_table(data.held_out, dataclasses.replace(data, split="train", config=""))
        except SettingError as error:
            raise SettingError("data.held_out", data.held_out, error.allowed) from None
    if dataset in MADE or Path(dataset).is_file():
        words = f"a file or folder that is there, since {dataset} has one split only"
        raise SettingError("data.held_out", data.held_out, words)
    return read_table(dataset, dataclasses.replace(data, split=data.held_out))


def _read_local(dataset: str, path: Path, data: DataSettings) -> Table:
    """Reads a file or a folder. `datasets` tells which files of a folder are of which split."""
    texts = path.is_file() and path.suffix == ".txt"
    if texts or _is_folder_of_texts(path, data):
        files = {"train": [path] if texts else _data_files(path)}
        return Table(dataset, path.stem, _of_split(files, data.split, lambda some: _texts(path, some)))
    if path.is_file() and path.suffix in READ_HERE:
        return _table_of_rows(dataset, path.stem, {"train": [path]}, data)

    datasets = _quiet_datasets()
    with _without_patterns(path) as (plain, cache):
        if plain.is_dir() and not _is_saved(plain):
            builder = datasets.load_dataset_builder(str(plain), data.config or None)
            if files := _files_read_here(builder):
                return _table_of_rows(dataset, path.stem, files, data, builder.info.features or {})
        return _as_table(dataset, path.stem, _load(str(plain), plain, data, cache))


def _is_folder_of_texts(path: Path, data: DataSettings) -> bool:
    """Tells whether all files of a folder are texts, and nothing says that `datasets` should read them by lines."""
    if not path.is_dir() or _is_saved(path) or data.config or (path / "README.md").exists():
        return False
    return all(file.suffix == ".txt" for file in _data_files(path))


def _texts(root: Path, files: Sequence[Path]) -> Columns:
    """Every file is a text; its owner is the folder that it lies in, or else its own name."""
    texts, owners = [], []
    for file in files:
        try:
            texts.append(read_text(file))
        except ValueError as error:
            raise SettingError("dataset", file, f"a text in UTF-8 ({error})") from None
        owners.append(file.stem if file.parent == root or file == root else file.parent.name)
    return {"text": texts, "owner": owners}


def _table_of_rows(
    dataset: str, name: str, files: Mapping[str, Sequence[Path]], data: DataSettings, features: Mapping[str, Any] = {}
) -> Table:
    """Reads files of CSV or JSON.

    Args:
        dataset: What the user calls them.
        name: What their owner is called.
        files: By split.
        data: The settings.
        features: What a README.md says of the columns, in the library's types. Only names of classes are used.

    Raises:
        ValueError: A file cannot be read, or has a class without a name.
    """
    classes = _classes(features)
    numbers = {data.label} - classes.keys()

    def read(some: Sequence[Path]) -> Columns:
        columns = read_rows(some, numbers)
        numbered = {column: _class_numbers(columns[column], features[column]) for column in classes.keys() & columns}
        return {**columns, **numbered}

    columns = _of_split(files, data.split, read)
    doubled = doubled_columns([path for some in files.values() for path in some])
    return Table(dataset, name, columns, {column: classes[column] for column in classes.keys() & columns}, doubled)


def _class_numbers(values: Sequence[Any], label: Any) -> list[int | None]:
    """Numbers of classes, which are written as names or as numbers; None where there is no value."""
    return [None if value is None else label.encode_example(value) for value in values]


def _files_read_here(builder: Any) -> dict[str, list[Path]]:
    """Files by split, if they are rows of CSV or JSON, and a README.md asks for no other way to read them.

    Types of columns are no such way: values are read as they are written.
    """
    config = builder.config
    splits = config.data_files or {}
    files = {str(split): [Path(str(file)) for file in some] for split, some in splits.items()}
    usual = type(config)(
        name=config.name,
        version=config.version,
        data_dir=config.data_dir,
        data_files=config.data_files,
        description=config.description,
    )
    ours = all(file.suffix in READ_HERE and file.is_file() for some in files.values() for file in some)
    return files if ours and config == usual else {}


def _of_split(
    files: Mapping[str, Sequence[Path]], split: str, read: Callable[[Sequence[Path]], Columns]
) -> dict[str, Sequence[Any]]:
    """Columns of a split, of a part of one such as train[:10%], or of all splits under the name all.

    Raises:
        ValueError: There is no such split.
    """
    if split in files:
        return dict(read(files[split]))
    if split == "all":
        split = "+".join(files)
    datasets = _quiet_datasets()
    columns = {name: read(some) for name, some in files.items()}
    lengths = {name: len(next(iter(some.values()), ())) for name, some in columns.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    found: dict[str, list[Any]] = {name: [] for part in parts for name in columns[part.splitname]}
    for part in parts:
        empty = [None] * lengths[part.splitname]
        for name, values in found.items():
            values += columns[part.splitname].get(name, empty)[part.from_ : part.to]
    return dict(found)


_PATTERN = re.compile(r"[*?\[\]]|::")
"""What `datasets` takes for a pattern, or for an address within another one."""


@contextlib.contextmanager
def _without_patterns(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields a path to the same files by which `datasets` finds them, and where it is to keep what it makes of them.

    Both are temporary where a name is like a pattern; else they are the path itself and None, the usual place.
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
            if link.exists():  # two names that differ in a pattern only
                link = link.with_name(f"{link.stem}_{number}{link.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())
        yield root if path.is_dir() else link, str(Path(folder) / "cache")


def _read_hub(dataset: str, data: DataSettings) -> Table:
    path = Path(dataset)
    return _as_table(dataset, path.stem, _load(dataset, path, data))


def _quiet_datasets() -> Any:
    """Imports `datasets`, which takes seconds and which the bundled corpus does not need, and keeps it from talking."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _as_table(dataset: str, name: str, rows: Any) -> Table:
    return Table(dataset, name, {column: rows[column][:] for column in rows.column_names}, _classes(rows.features))


def _classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes, of columns whose feature has them."""
    return {column: list(feature.names) for column, feature in features.items() if hasattr(feature, "names")}


def _load(dataset: str, path: Path, data: DataSettings, cache: str | None = None) -> Any:
    datasets = _quiet_datasets()
    if path.is_dir() and _is_saved(path):
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, datasets.DatasetDict):
            if data.split != "train" or data.config:
                raise ValueError("it has neither splits nor configurations")
            return found
        if data.config or data.split not in found:
            raise ValueError(f"its splits are {', '.join(found)}, and it has no configurations")
        return found[data.split]
    if path.is_file():
        kind = FILE_TYPES[path.suffix]
        return datasets.load_dataset(kind, data_files=str(path), split=data.split, cache_dir=cache)
    return datasets.load_dataset(dataset, data.config or None, split=data.split, cache_dir=cache)


def _kind(path: Path) -> str:
    if path.is_file():
        return f"a {path.suffix} file that can be read"
    return "a folder that can be read" if path.is_dir() else "a data set of the Hub that can be reached"


def _reason(error: Exception, path: Path) -> str:
    """Says in one line what was wrong."""
    if isinstance(error, StopIteration) or (path.is_file() and not path.stat().st_size):
        return "it is empty"
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    words = " ".join(str(cause).split()) or type(cause).__name__
    if words.endswith("corresponds to no data!"):
        return "it is empty"
    return words if len(words) <= 300 else f"{words[:300]}…"
