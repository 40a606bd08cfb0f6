"""What finished runs left: their folders, and the PEFT adapters in them."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.allowed import PARTS, InputError, SettingError
from fedsplit.config import Config
from fedsplit.documents import build
from fedsplit.flags import read_toml

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT calls the two files of an adapter."""

PICKLED = "adapter_model.bin"
"""What PEFT called the second one before, which may hold code."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in a folder.

    Attributes:
        folder: Where.
        model: The base model it is for, as `--model` names it.
        dtype: The type in which its run held that model, one of `fedsplit.allowed.DTYPES`.
        name: What to call it.
        cut: The run's cut.
        quantization: What of that model its run held in 4 or 8 bits, as in the settings.
        classes: The names of the classes that it tells, where its run learned to and says so.
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
        """The folder of its base model.

        Raises:
            SettingError: There is no such model, or it cannot be had.
        """
        from fedsplit.model.sources import weights  # not before the environment is set that its libraries read

        return weights(Config(model=self.model, dtype=self.dtype))

    @property
    def about_path(self) -> Path:
        """A folder that has all of its base model but the weights.

        Raises:
            SettingError: There is no such model, or it cannot be had.
        """
        from fedsplit.model.sources import about  # as above

        return about(Config(model=self.model, dtype=self.dtype))


@dataclass(frozen=True)
class Run:
    """A run that came to its end.

    Attributes:
        path: Its folder.
        config: Its settings.
        summary: Its summary.
    """

    path: Path
    config: Config
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What to call it: its folder's name."""
        return self.path.resolve().name

    @property
    def personal(self) -> list[int]:
        """The clients that have an adapter of their own."""
        found = (self.path / "personal").glob("*")
        return sorted(int(folder.name) for folder in found if re.fullmatch(r"\d{4,}", folder.name, re.ASCII))

    @property
    def parts(self) -> dict[str, Path]:
        """The adapter's folder of each part."""
        return {part: self.path / f"{part}_lora" for part in PARTS}

    def adapter(self, client: int | None = None) -> Adapter:
        """The run's adapter, or a client's own.

        Args:
            client: The number of the client; None for what all share.

        Raises:
            SettingError: The client has none.
        """
        if client is None:
            return self._adapter(self.path / "adapter", self.name)
        if client not in self.personal:
            words = f"one of {_listed(self.personal)}" if self.personal else "none: in this run all clients share one"
            raise SettingError("client", client, f"{words}, the clients with an adapter of their own")
        return self._adapter(self.path / "personal" / f"{client:04d}", f"{self.name}-client-{client:04d}")

    def _adapter(self, folder: Path, name: str) -> Adapter:
        config = self.config
        bits, classes = config.quantization, self._classes()
        return Adapter(_whole(folder), config.model, config.dtype, name, config.cut, bits, classes)

    def _classes(self) -> tuple[str, ...]:
        """The names of the classes, by what the run wrote of its data; none where it wrote none."""
        if self.config.data.format != "classification":
            return ()
        try:
            return tuple(json.loads((self.path / "data.json").read_text(encoding="utf-8"))["classes"])
        except (OSError, ValueError, KeyError, TypeError):
            return ()


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _whole(folder: Path) -> Path:
    """The folder of an adapter, if it has the files.

    Raises:
        InputError: It does not.
    """
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            pickled = f" ({PICKLED} is not read, since it may hold code)" if (folder / PICKLED).is_file() else ""
            raise InputError(f"{folder} is no adapter: there is no {name} in it{pickled}")
    return folder


def open_run(path: Path) -> Run:
    """Opens the folder of a run that came to its end.

    Raises:
        InputError: There is no such folder, it is not a run's, or the run did not end.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder of a run: there is no such folder")
    if not (path / "config.toml").is_file():
        raise InputError(f"{path} is no folder of a run: there is no config.toml in it")
    values, options = read_toml(path / "config.toml")
    config = build(values, options["strategy"], options["objective"])
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        rounds = int(summary["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        rounds = 0
    if rounds >= config.rounds:
        _check_summary(path, summary)
    if rounds < config.rounds:
        done = f"{rounds} of its {config.rounds} rounds are" if rounds else "there is no summary.json of it"
        raise InputError(f"the run in {path} did not end ({done}{' summed up' if rounds else ''}); --resume goes on")
    return Run(path, config, summary)


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Makes sure that a summary has what commands after a run show of it.

    Raises:
        InputError: It has not.
    """
    try:
        for part in PARTS:
            int(summary["parameters"][part]["total"]), int(summary["parameters"][part]["trainable"])
        for when in ("before", "after"):
            float(summary["eval_loss"][when])
        for count in dict(summary["bytes"]).values():
            int(count)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the run in {path} has a damaged summary.json ({type(error).__name__}: {error})") from None


def whole_files(adapter: Adapter) -> Adapter:
    """An adapter whose folder has the files of one.

    Raises:
        InputError: It has not.
    """
    _whole(adapter.folder)
    return adapter


def find_adapter(path: Path, client: int | None = None) -> Adapter:
    """The adapter of a run's folder, or that of a folder PEFT wrote, such as a combined one.

    Args:
        path: The folder.
        client: Of a run, the client whose own adapter it is to be; None for what all share.

    Raises:
        InputError: There is no such folder, it is neither, or the client has no adapter of its own.
    """
    if not (path / ADAPTER_FILES[0]).is_file():
        _check_single(path)
        return open_run(path).adapter(client)
    if client is not None:
        raise InputError(f"{path} is an adapter, not a run: it has no clients")
    from fedsplit.model.sources import from_peft

    try:
        document = json.loads((path / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        model = from_peft(str(document["base_model_name_or_path"]), document.get("revision"))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no adapter: its {ADAPTER_FILES[0]} names no base model") from None
    return Adapter(_whole(path), model, "fp32", path.resolve().name)


def _check_single(path: Path) -> None:
    """Makes sure that a folder is not one of several adapters, as PEFT writes those of one model.

    Raises:
        InputError: It is.
    """
    inside = sorted(found.parent.name for found in path.glob(f"*/{ADAPTER_FILES[0]}"))
    if inside and not (path / "config.toml").exists():
        raise InputError(f"{path} holds several adapters, {', '.join(inside)}: name the folder of one of them")


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Makes sure that adapters belong to one base model: one folder, or folders whose weights are the same bytes.

    Raises:
        InputError: They do not.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if _held(other) != _held(first):
            both = f"{first.folder} in {_held(first)}, {other.folder} in {_held(other)}"
            raise InputError(f"the adapters were trained on base models of different types: {both}")
        if other.model != first.model and not _same_weights(first.model_path, other.model_path):
            both = f"{first.folder} of {first.model}, {other.folder} of {other.model}"
            raise InputError(f"the adapters belong to different base models: {both}")


def _held(adapter: Adapter) -> str:
    """The types in which an adapter's run held the base model, in words."""
    bits = adapter.quantization
    return f"{adapter.dtype} with {bits} bits at the cut {adapter.cut}" if bits else adapter.dtype


def _same_weights(one: Path, two: Path) -> bool:
    if one.resolve() == two.resolve():
        return True
    from fedsplit.model.weight_files import find_tensors  # takes a while to import

    files = [{file.name: file for file in find_tensors(path).values()} for path in (one, two)]
    if files[0].keys() != files[1].keys():
        return False
    return all(filecmp.cmp(file, files[1][name], shallow=False) for name, file in files[0].items())


def copy_adapter(adapter: Adapter, folder: Path) -> None:
    """Copies an adapter's files into a folder, which is made."""
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter.folder / name, folder / name)


def as_tasks(adapters: Sequence[Adapter], names: Sequence[str] = ()) -> dict[str, Adapter]:
    """Adapters by the names under which PEFT switches between them.

    Args:
        adapters: All of one base model.
        names: Their names; those of their runs where none are given, without what PEFT does not allow.

    Raises:
        InputError: There are not as many names as adapters, two are equal, or PEFT does not allow one.
    """
    if names and len(names) != len(adapters):
        raise InputError(f"names: {len(names)} for {len(adapters)} adapters ({', '.join(a.name for a in adapters)})")
    chosen = list(names) or [re.sub(r"[^\w-]", "-", adapter.name) for adapter in adapters]
    for name in chosen:
        if not re.fullmatch(r"[\w-]+", name, re.ASCII) or "lora_" in name:  # PEFT's own names begin so
            raise InputError(f"names: {name!r} is not possible; allowed: letters, digits, - and _, without lora_")
    if doubled := [name for name in chosen if chosen.count(name) > 1]:
        raise InputError(f"names: {doubled[0]} is there twice; give every adapter a name of its own with --names")
    return dict(zip(chosen, adapters, strict=True))
