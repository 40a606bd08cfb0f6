"""Finished runs: folders of runs, and the PEFT adapters in the folders."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import InputError, SettingError, shortened
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.settings.flags import read_toml

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Names of the two files of a PEFT adapter."""

CARD = "README.md"
"""Name of an adapter's model card. Adapters that PEFT wrote may have none."""

PICKLED = "adapter_model.bin"
"""Former name of the second file. The file is a pickle, and may hold code."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in a folder.

    Attributes:
        folder: The folder.
        model: Base model, in the form of `--model`.
        dtype: Type of the base model in the run, a name in `fedsplit.settings.choices.DTYPES`.
        name: Name of the adapter on the screen.
        cut: Cut of the run.
        quantization: Parts of the base model in 4 or 8 bits, in the form of the setting.
        classes: Names of the classes; empty if the run trained no classifier, or recorded no names.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> adapter = Adapter(Path("runs/demo/adapter"), str(BUNDLED_MODEL), "fp32", name="demo")
        >>> adapter.about_path == BUNDLED_MODEL
        True
    """

    folder: Path
    model: str
    dtype: str
    name: str
    cut: str = Config.cut
    quantization: str = ""
    classes: tuple[str, ...] = ()

    @property
    def model_path(self) -> Path:
        """Folder of the base model, fetched from the Hub if need be.

        Raises:
            SettingError: The model does not exist, or cannot be fetched.
        """
        # Not at the top: the libraries read environment variables at import, and commands set the variables first.
        from fedsplit.model.sources import weights_folder

        return weights_folder(Config(model=self.model, dtype=self.dtype))

    @property
    def about_path(self) -> Path:
        """Folder with all files of the base model except weights, fetched from the Hub if need be.

        Raises:
            SettingError: The model does not exist, or cannot be fetched.
        """
        from fedsplit.model.sources import config_folder  # as in `model_path`

        return config_folder(self.model)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Folder of the run.
        config: Settings of the run.
        summary: Content of summary.json.
    """

    path: Path
    config: Config
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the run on the screen: the name of the folder."""
        return self.path.resolve().name

    @property
    def personal(self) -> list[int]:
        """Numbers of the clients with a personal adapter."""
        numbers = []
        for folder in (self.path / "personal").glob("*"):
            if re.fullmatch(r"\d{4,}", folder.name, re.ASCII):
                numbers.append(int(folder.name))
        return sorted(numbers)

    @property
    def parts(self) -> dict[str, Path]:
        """Folder of each part's adapter."""
        return {part: self.path / f"{part}_lora" for part in PARTS}

    def check_shared(self) -> None:
        """Checks that all clients share a single adapter.

        Raises:
            InputError: Clients have personal adapters, and the user must name a client.
        """
        if self.personal:
            numbers = _listed(self.personal)
            raise InputError(
                f"in the run in {self.path} every client has an adapter of its own: say --client, one of {numbers}"
            )

    def adapter(self, client: int | None = None) -> Adapter:
        """Returns the shared adapter of all clients, or a client's personal adapter.

        Args:
            client: Number of the client; None for the shared adapter.

        Raises:
            SettingError: The client has no personal adapter.
        """
        if client is None:
            return self._adapter(self.path / "adapter", self.name)
        if not self.personal:
            raise SettingError("client", client, "none: in this run all clients share one adapter")
        if client not in self.personal:
            allowed = f"one of {_listed(self.personal)}, the clients with a personal adapter"
            raise SettingError("client", client, allowed)
        return self._adapter(self.path / "personal" / f"{client:04d}", f"{self.name}-client-{client:04d}")

    def _adapter(self, folder: Path, name: str) -> Adapter:
        check_files(folder)
        config = self.config
        return Adapter(
            folder,
            model=config.model,
            dtype=config.dtype,
            name=name,
            cut=config.cut,
            quantization=config.quantization,
            classes=self._classes(),
        )

    def _classes(self) -> tuple[str, ...]:
        """Returns the names of the classes from the run's data.json, or nothing if the file holds no classes."""
        if self.config.data.format != "classification":
            return ()
        try:
            document = json.loads((self.path / "data.json").read_text(encoding="utf-8"))
            return tuple(document["classes"])
        except (OSError, ValueError, KeyError, TypeError):
            return ()  # only messages and the merged model's labels lack the names then


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def check_files(folder: Path) -> None:
    """Checks that a folder holds both files of a PEFT adapter.

    Raises:
        InputError: A file is missing.

    Example:
        >>> check_files(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no adapter: there is no adapter_config.json in it
    """
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            continue
        has_pickle = (folder / PICKLED).is_file()
        pickled = f" ({PICKLED} is not read, since it may hold code)" if has_pickle else ""
        raise InputError(f"{folder} is no adapter: there is no {name} in it{pickled}")


def open_run(path: Path) -> Run:
    """Opens the folder of a finished run.

    Raises:
        InputError: The folder does not exist or holds no run, or the run did not end.

    Example:
        >>> open_run(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no folder of a run: there is no such folder
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder of a run: there is no such folder")
    if not (path / "config.toml").is_file():
        raise InputError(f"{path} is no folder of a run: there is no config.toml in it")
    values, options = read_toml(path / "config.toml")
    config = build(values, *options.values())

    # The summary is the last file of a run. Without it, the adapters may be of any round, or missing.
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        rounds = int(summary["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        rounds = 0
    if not rounds:
        has_checkpoint = any((path / "checkpoints").glob("round-*"))
        how = "goes on" if has_checkpoint else "begins it again"
        raise InputError(f"the run in {path} did not end (there is no summary.json of it); --resume {path} {how}")
    if rounds < config.rounds:
        done = f"{rounds} of its {config.rounds} rounds are summed up"
        raise InputError(f"the run in {path} did not end ({done}); --resume {path} goes on")
    _check_summary(path, summary)
    return Run(path, config, summary)


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Checks that a summary holds the values that later commands read.

    Raises:
        InputError: A value is missing or is no number.
    """
    try:
        for part in PARTS:
            int(summary["parameters"][part]["total"])
            int(summary["parameters"][part]["trainable"])
        for when in ("before", "after"):
            float(summary["eval_loss"][when])
        for count in dict(summary["bytes"]).values():
            int(count)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the run in {path} has a damaged summary.json ({type(error).__name__}: {error})") from None


def find_adapter(path: Path, client: int | None = None) -> Adapter:
    """Returns the adapter in a run's folder, or in a folder from PEFT or `fedsplit.adapters`.

    Args:
        path: The folder.
        client: Number of the client, for a personal adapter in a run; None for the shared adapter.

    Raises:
        InputError: The folder does not exist or holds no adapter, or the client has no personal adapter.

    Example:
        >>> find_adapter(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no folder of a run: there is no such folder
    """
    if not (path / ADAPTER_FILES[0]).is_file():
        _check_one_adapter(path)
        return open_run(path).adapter(client)
    if client is not None:
        raise InputError(f"{path} is an adapter, not a run: it has no clients")
    from fedsplit.model.sources import from_peft

    try:
        document = json.loads((path / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        model = from_peft(str(document["base_model_name_or_path"]), document.get("revision"))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no adapter: its {ADAPTER_FILES[0]} names no base model") from None
    check_files(path)
    return Adapter(path, model, "fp32", path.resolve().name)  # a folder of PEFT's names no type


def _check_one_adapter(path: Path) -> None:
    """Checks that a folder does not hold several adapters. PEFT writes all adapters of a model into one folder.

    Raises:
        InputError: The folder holds several adapters.
    """
    inside = sorted(file.parent.name for file in path.glob(f"*/{ADAPTER_FILES[0]}"))
    if inside and not (path / "config.toml").exists():
        raise InputError(f"{path} holds several adapters, {', '.join(inside)}: name the folder of one of them")


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Checks that adapters belong to one base model: to one folder, or to folders with equal weights.

    Raises:
        InputError: The adapters belong to different base models, or were trained on different types of a base model.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if _types_of_base(other) != _types_of_base(first):
            both = f"{first.folder} in {_types_of_base(first)}, {other.folder} in {_types_of_base(other)}"
            raise InputError(f"the adapters were trained on base models of different types: {both}")
        if other.model != first.model and not _same_weights(first.model_path, other.model_path):
            both = f"{first.folder} of {first.model}, {other.folder} of {other.model}"
            raise InputError(f"the adapters belong to different base models: {both}")


def _types_of_base(adapter: Adapter) -> str:
    """Returns in words the types of the base model in an adapter's run."""
    bits = adapter.quantization
    if not bits:
        return adapter.dtype
    return f"{adapter.dtype} with {bits} bits at the cut {adapter.cut}"  # the cut tells which blocks have the bits


def _same_weights(left: Path, right: Path) -> bool:
    """Returns True if the folders of two models hold equal weights, byte by byte."""
    if left.resolve() == right.resolve():
        return True
    from fedsplit.model.weight_files import find_tensors  # takes a while to import

    left_files = {file.name: file for file in find_tensors(left).values()}
    right_files = {file.name: file for file in find_tensors(right).values()}
    if left_files.keys() != right_files.keys():
        return False
    pairs = ((file, right_files[name]) for name, file in left_files.items())
    # Not shallow: equal sizes and times are no proof of equal bytes.
    return all(filecmp.cmp(*pair, shallow=False) for pair in pairs)


def copy_adapter(adapter: Adapter, folder: Path) -> None:
    """Copies an adapter's files into a new folder."""
    folder.mkdir(parents=True)
    card = adapter.folder / CARD
    for name in (*ADAPTER_FILES, *([CARD] if card.is_file() else [])):
        shutil.copyfile(adapter.folder / name, folder / name)


def as_tasks(adapters: Sequence[Adapter], names: Sequence[str] = ()) -> dict[str, Adapter]:
    """Returns adapters by name, for PEFT's `set_adapter`.

    Args:
        adapters: Adapters of one base model.
        names: Name of each adapter. By default the names of the runs, with - for characters that PEFT refuses.

    Raises:
        InputError: The number of names is wrong, two names are the same folder on some disk, or PEFT refuses a name.

    Example:
        >>> adapters = [Adapter(Path(folder), "gpt2", "fp32", name=folder) for folder in ("run 1", "run 2")]
        >>> list(as_tasks(adapters))
        ['run-1', 'run-2']
    """
    if names and len(names) != len(adapters):
        of_adapters = ", ".join(adapter.name for adapter in adapters)
        raise InputError(f"names: {len(names)} for {len(adapters)} adapters ({of_adapters})")
    chosen = list(names) or [re.sub(r"[^\w-]", "-", adapter.name) for adapter in adapters]
    for name in chosen:
        is_plain = re.fullmatch(r"[\w-]{1,200}", name, re.ASCII) is not None
        if not is_plain or "lora_" in name:  # PEFT finds factors by the prefix
            allowed = "up to 200 letters, digits, - and _, without lora_"
            raise InputError(f"names: {shortened(name)} is not possible; allowed: {allowed}")
    # On some disks, names that differ in case alone are one folder.
    folders = [name.lower() for name in chosen]
    doubled = [name for name in chosen if folders.count(name.lower()) > 1]
    if doubled:
        raise InputError(f"names: {doubled[-1]} is there twice; give every adapter a name of its own with --names")
    return dict(zip(chosen, adapters, strict=True))
