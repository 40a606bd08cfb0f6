"""Where data come from: the bundled corpus, the synthetic language, files, folders and the Hub, all as tables."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.allowed import SettingError
from fedsplit.config import DataSettings
from fedsplit.corpora.corpus import FIRST_CLIENT_YEAR, sotu
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
    """

    dataset: str
    name: str
    columns: Mapping[str, Sequence[Any]]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

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
            SettingError: There is none of that name.
        """
        if name not in self.columns:
            raise SettingError(setting, name, f"a column of {self.dataset}: {self.listed}")
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
    texts = [path] if path.is_file() else _data_files(path) if path.is_dir() and not _is_saved(path) else []
    if texts and all(file.suffix == ".txt" for file in texts) and not (data.config or (path / "README.md").exists()):
        table = _read_texts(dataset, path, texts)
    else:
        table = _read_rows(dataset, path, data)
    if not len(table):
        raise SettingError("dataset", f"{dataset} (it is empty)", "a data set with at least one row")
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


def _read_texts(dataset: str, root: Path, files: Sequence[Path]) -> Table:
    """Every file is a text; whose it is says the folder that it lies in, or else its own name."""
    texts, owners = [], []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8").strip())
        except (OSError, ValueError) as error:
            raise SettingError("dataset", file, f"a text in UTF-8 ({error})") from None
        owners.append(file.stem if file.parent == root or file == root else file.parent.name)
    return Table(dataset, root.stem, {"text": texts, "owner": owners})


def _read_rows(dataset: str, path: Path, data: DataSettings) -> Table:
    import datasets  # takes seconds to import, and the bundled corpus does not need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = _load(datasets, dataset, path, data)
    except Exception as error:  # noqa: BLE001  # the library raises a dozen kinds, the Hub's and the network's among them
        raise SettingError("dataset", dataset, f"{_kind(path)} ({_reason(error, path)})") from None
    classes = {name: list(made.names) for name, made in rows.features.items() if hasattr(made, "names")}
    return Table(dataset, path.stem, {name: rows[name][:] for name in rows.column_names}, classes)


def _load(datasets: Any, dataset: str, path: Path, data: DataSettings) -> Any:
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
        return datasets.load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split=data.split)
    return datasets.load_dataset(str(path) if path.is_dir() else dataset, data.config or None, split=data.split)


def _kind(path: Path) -> str:
    if path.is_file():
        return f"a {path.suffix} file that can be read"
    return "a folder that can be read" if path.is_dir() else "a data set of the Hub that can be reached"


def _reason(error: Exception, path: Path) -> str:
    """What was wrong, in one line; of JSON with the number of its line."""
    if path.is_file() and path.suffix in (".json", ".jsonl") and (fault := _json_fault(path)):
        return fault
    if isinstance(error, StopIteration) or (path.is_file() and not path.stat().st_size):
        return "it is empty"
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    words = " ".join(str(cause).split()) or type(cause).__name__
    if words.endswith("corresponds to no data!"):
        return "it is empty"
    return words if len(words) <= 300 else f"{words[:300]}…"


def _json_fault(path: Path) -> str | None:
    """The first line that is no JSON; None where each is, or the file is one document."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return str(error)
    try:
        json.loads(text)
        return None
    except ValueError as error:
        if text.lstrip().startswith("["):
            return f"it is not JSON: {error}"
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                json.loads(line)
            except ValueError as error:
                return f"line {number} is not JSON: {error}"
    return None
