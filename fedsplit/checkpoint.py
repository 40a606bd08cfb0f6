"""The run's folder: what is written, when, and so that a crash leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from fedsplit import adapters
from fedsplit.config import Config, SettingError, as_document
from fedsplit.families import Family
from fedsplit.split import Kind, ranges


def check_folder(path: Path) -> None:
    """Makes sure that a run's folder can be made, and leaves nothing behind.

    Raises:
        SettingError: The folder is there and not empty, or cannot be written.
    """
    allowed = "a folder that is not there yet or is empty, where files can be written"
    nearest = path
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise SettingError("out", f"{path} (there already)", allowed)
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror})", allowed) from None
    try:  # only trying tells: permissions do not bind root, and a disk may be full or read-only
        os.rmdir(tempfile.mkdtemp(dir=nearest))
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror} in {nearest})", allowed) from None


def _write_whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside its final place, makes it durable, and moves it there in one step."""
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    fill(draft)
    for file in draft.iterdir():
        _sync(file)
    _sync(draft)
    draft.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """Everything a run leaves behind.

    `config.toml` runs again with `--config`; `metrics.jsonl` has an object an event; `summary.json` the
    result; `adapter/` is one PEFT adapter of the unsplit model; `bottom_lora/`, `trunk_lora/`, `top_lora/`
    are the same by part; `checkpoints/round-NNNN/` is the adapter after each round.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, config: Config, family: Family, blocks: int) -> None:
        """Makes the folder and writes the configuration.

        Args:
            path: Where.
            config: The run's.
            family: The model's family.
            blocks: Number of blocks of the model.
        """
        self.path, self._config, self._family = path, config, family
        self._ranges = ranges(blocks, config.bounds)
        (path / "checkpoints").mkdir(parents=True)
        (path / "config.toml").write_text(tomli_w.dumps(as_document(config)), encoding="utf-8")

    def log(self, event: Mapping[str, Any]) -> None:
        """Appends an event to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def save_round(self, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the adapter of the whole model after a round."""
        _write_whole(self.path / "checkpoints" / f"round-{round:04d}", lambda folder: self._save(folder, tensors))

    def save_result(self, tensors: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
        """Writes the final adapter, whole and by part, and the summary last."""
        _write_whole(self.path / "adapter", lambda folder: self._save(folder, tensors))
        for kind in self._ranges:
            _write_whole(self.path / f"{kind}_lora", lambda folder, kind=kind: self._save(folder, tensors, kind))  # type: ignore[misc]
        draft = self.path / ".summary.json"
        draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        draft.rename(self.path / "summary.json")

    def _save(self, folder: Path, tensors: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        blocks = None if kind is None else self._ranges[kind]
        if blocks is not None:
            prefixes = tuple(f"{self._family.decoder}.{self._family.blocks}.{block}." for block in blocks)
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        adapters.save(folder, tensors, self._config.lora, self._family, self._config.model, blocks)
