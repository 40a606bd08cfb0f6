"""Folders of runs that nobody has trained: checkpoints of a tiny model's adapters, as a run writes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from conftest import BLOCKS
from test_lora import adapted

from fedsplit.adaptation import lora
from fedsplit.events.run_files import append_lines
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.manifest import Content
from fedsplit.settings.config import Config
from fedsplit.settings.sections import CheckpointSettings, LoraSettings
from fedsplit.updates import Adapters

CONTENT = Content("data", {"config.json": "one", "model.safetensors": "two"})


def config_of(model: Path, keep: int = 0, **settings: Any) -> Config:
    """Returns the settings of a run whose checkpoints are all kept, unless a test says otherwise."""
    checkpoint = CheckpointSettings(keep=keep)
    config = Config(model=str(model), cut="1:2", lora=LoraSettings(rank=(3,), alpha=6.0), checkpoint=checkpoint)
    return dataclasses.replace(config, **settings)


class OpenedFolder(RunFolder):
    """The folder of a run, with the adapters that tests save in it."""

    whole: Adapters


def opened(path: Path, config: Config, content: Content = CONTENT) -> OpenedFolder:
    """Returns the folder of a run of the tiny model, made or opened again; `whole` holds its adapters."""
    parts = adapted(Path(config.model), (1, 2))
    made = OpenedFolder(path, config, parts[0].family, BLOCKS, content)
    made.whole = lora.read(*parts)
    return made


def again(folder: RunFolder, config: Config | None = None) -> OpenedFolder:
    """Returns the folder of a run that goes on; the process that had it open is gone."""
    folder._lock.close()
    return opened(folder.path, config or going(folder, 9))


def going(folder: RunFolder, rounds: int, **settings: Any) -> Config:
    """Returns the settings of a run that is to go on."""
    return dataclasses.replace(folder._config, rounds=rounds, resume=str(folder.path), **settings)


def log(folder: RunFolder, document: dict[str, Any]) -> None:
    append_lines(folder.path / "metrics.jsonl", [json.dumps(document).encode() + b"\n"])


def snapshot(round: int, **facts: Any) -> Snapshot:
    """Returns a snapshot whose values tell its round."""
    groups = {"adapters": {"x": torch.full((2,), float(round))}}
    return Snapshot(round, {"after": 1.5 + round, **facts}, groups)


def play(folder: OpenedFolder, *rounds: int, **facts: Any) -> None:
    """Writes the events and the checkpoint of some rounds."""
    for round in rounds:
        log(folder, {"event": "train", "round": round})
        folder.save_round(snapshot(round, **facts), folder.whole)


def checkpoints(folder: RunFolder) -> list[int]:
    """Returns the rounds that have a checkpoint."""
    return sorted(int(path.name.removeprefix("round-")) for path in (folder.path / "checkpoints").glob("round-*"))
