"""A checkpoint's manifest: its run and its round, versions, and a digest of every file that the run goes on from.

A run may go on only from what it wrote itself. Damaged files, files of another round, and a run whose settings, data or
model have become others are told apart by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.corpora.shards import Shard
from fedsplit.errors import SettingError, first_line
from fedsplit.events.versions import versions
from fedsplit.loading import file_of, name_of
from fedsplit.model.weight_files import find_tensors
from fedsplit.settings.config import OPTIONS, Config
from fedsplit.settings.documents import as_document, dotted
from fedsplit.settings.flags import MAY_DIFFER

NAME = "manifest.json"
"""The manifest's file in a round's folder."""

MAY_CHANGE = frozenset({*MAY_DIFFER, "data.show", "trunk.lanes", "trunk.memory", "trunk.lease"})
"""Settings that may be others when a run goes on: how long it lasts, and what of the machine it uses."""

BY_CONTENT = frozenset({"model", "dataset", "data.held_out", "init_adapter"})
"""Settings that name files: what counts is what is in these, wherever they lie."""


class Damaged(Exception):
    """A checkpoint is not what was written; says what is wrong with it."""


@dataclass(frozen=True)
class Content:
    """What a run computes with beside its settings.

    Attributes:
        data: A digest of all clients' data, as they were dealt out.
        model: Digests of the base model's files, by name.
        start: Digests of the files of the adapter that the run starts from, by name; none where there is none.
        code: Digests of the user's files with strategy, objective and metrics, by setting, such as "strategy" or
            "metric.rouge". Modules that these files import are not looked at.
    """

    data: str
    model: Mapping[str, str]
    start: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        round: The round that it is of.
        settings: The run's settings that decide its result, by dotted name.
        content: What the run computes with.
        files: Digests of the files in the round's folder, by their path in it.
        elsewhere: Digests of the other files that the run goes on from, by their path in the run's folder.
        versions: Versions of what computed the round, by name.
    """

    round: int
    settings: Mapping[str, Any]
    content: Content
    files: Mapping[str, str]
    elsewhere: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_of(config: Config) -> dict[str, Path]:
    """Returns the user's files that the settings name, by setting; a sink decides no result, and has no entry.

    Example:
        >>> code_of(Config(strategy="my/mine.py:Mine", metric=("token_accuracy", "my/mine.py:rouge")))
        {'strategy': PosixPath('my/mine.py'), 'metric.rouge': PosixPath('my/mine.py')}
    """
    specs = {"strategy": config.strategy, "objective": config.objective}
    specs |= {f"metric.{name_of(spec)}": spec for spec in config.metric}
    files = {setting: file_of(spec) for setting, spec in specs.items()}
    return {setting: file for setting, file in files.items() if file is not None}


def content_of(
    shards: Sequence[Shard], about: Path, weights: Path, start: str = "", code: Mapping[str, Path] | None = None
) -> Content:
    """Digests of a run's data, model and code of the user's.

    Args:
        shards: By client.
        about: The folder of the model's config.json.
        weights: The folder of its weights, all of which are read.
        start: Folder of the adapter that the run starts from; empty where there is none.
        code: The user's files by setting, as `code_of` returns them.
    """
    files = {about / "config.json", *find_tensors(weights).values()}
    adapter = sorted(Path(start).glob("adapter_*")) if start else []
    of_model = {file.name: digest(file) for file in sorted(files)}
    of_start = {file.name: digest(file) for file in adapter}
    of_code = {setting: digest(file) for setting, file in (code or {}).items()}
    return Content(_digest_of_shards(shards), of_model, of_start, of_code)


def _digest_of_shards(shards: Iterable[Shard]) -> str:
    """One digest of all clients' data, so that none of a single client's text lies at the server."""
    found = hashlib.sha256()
    for shard in shards:
        found.update(json.dumps([shard.name, shard.classes]).encode())
        for rows in (shard.train, shard.held_out):
            for entry in fields(rows):
                value = getattr(rows, entry.name)
                if isinstance(value, Tensor):
                    found.update(f"{entry.name} {value.dtype} {tuple(value.shape)}".encode())
                    found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that decide a run's result, by dotted name."""
    document = as_document(config)
    options = {
        f"{setting}.{name}": value for setting, table in OPTIONS.items() for name, value in document.pop(table).items()
    }
    plain = {**dotted(document), **options}
    may_change = MAY_CHANGE | BY_CONTENT
    decide = {
        name: value
        for name, value in plain.items()
        if name not in may_change and name.partition(".")[0] not in may_change  # such as sinks.MySink.project
    }
    settings: dict[str, Any] = json.loads(json.dumps(decide))  # as they will be read again
    return settings


def write(folder: Path, round: int, config: Config, content: Content, elsewhere: Mapping[str, str]) -> None:
    """Writes the manifest of a round's folder, which has all its other files already."""
    files = {str(file.relative_to(folder)): digest(file) for file in _files_in(folder)}
    document = {
        "round": round,
        "settings": settings_of(config),
        "content": {
            "data": content.data,
            "model": dict(content.model),
            "init_adapter": dict(content.start),
            "code": dict(content.code),
        },
        "files": files,
        "elsewhere": dict(elsewhere),
        "versions": versions(),
    }
    document["sha256"] = _digest_of_itself(document)
    (folder / NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _digest_of_itself(document: Mapping[str, Any]) -> str:
    """Returns the digest of a manifest's other values, so that damage to the manifest itself is found, too."""
    values = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _files_in(folder: Path) -> list[Path]:
    """The files of a round, but for the manifest and what is hidden, which nobody reads."""
    found = (path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read(folder: Path) -> Manifest:
    """Reads the manifest of a round's folder.

    Raises:
        Damaged: There is none, or it cannot be read.
    """
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
        held = document["content"]
        start, code = dict(held.get("init_adapter", {})), dict(held.get("code", {}))
        content = Content(str(held["data"]), dict(held["model"]), start, code)
        files, elsewhere = dict(document["files"]), dict(document["elsewhere"])
        settings, found = dict(document["settings"]), dict(document["versions"])
        is_whole = document["sha256"] == _digest_of_itself(document)
        written = Manifest(int(document["round"]), settings, content, files, elsewhere, found)
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}, without which nobody knows whether it is whole") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise Damaged(f"its {NAME} cannot be read ({reason})") from None
    if not is_whole:
        raise Damaged(f"{NAME} is not as it was written")
    return written


def check_whole(folder: Path, round: int) -> Manifest:
    """Makes sure that a round's folder holds all that was written there.

    Files that the manifest does not list are ignored. Nobody reads them, so that they cannot change a result; and a
    note that somebody left there must not cost a run that is otherwise whole.

    Args:
        folder: The round's folder.
        round: The round that its name says.

    Raises:
        Damaged: It is another round's, or a file is missing or not as it was written.
    """
    manifest = read(folder)
    if manifest.round != round:
        raise Damaged(f"it is that of round {manifest.round}")
    for name in sorted(manifest.files):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is not there")
    _check_files(folder, manifest.files)
    return manifest


def check_elsewhere(run: Path, manifest: Manifest) -> None:
    """Makes sure that the files of a run outside a round's folder are as they were.

    Raises:
        Damaged: One is missing, or another.
    """
    _check_files(run, manifest.elsewhere)


def _check_files(root: Path, digests: Mapping[str, str]) -> None:
    for name, expected in digests.items():
        try:
            found = digest(root / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise Damaged(f"{name} is not as it was written")


def check_settings(manifest: Manifest, config: Config, run: Path) -> None:
    """Makes sure that a run goes on with the settings that it began with.

    A setting that the manifest lacks did not exist when the run began. It counts as having had its default.

    Raises:
        SettingError: One that decides the result has changed.
    """
    now = settings_of(config)
    then = {**settings_of(Config()), **manifest.settings}
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            words = f"{_shown(then.get(name))}, with which the run in {run} came to round {manifest.round}"
            raise SettingError(name, _shown(now.get(name)), words)


def check_content(manifest: Manifest, content: Content, config: Config, run: Path, checkpoint: Path) -> None:
    """Makes sure that a run goes on with the data, the model and the user's code that it began with.

    Code that the manifest lacks was not looked at by the version that wrote it.

    Raises:
        SettingError: They have changed.
    """
    then = f"with which the run in {run} came to round {manifest.round}"
    if content.data != manifest.content.data:
        raise SettingError("dataset", f"{config.dataset} (other texts, or other tokens)", f"the data {then}")
    for name in sorted({*content.model, *manifest.content.model}):
        if content.model.get(name) != manifest.content.model.get(name):
            raise SettingError("model", f"{config.model} (another {name})", f"the model {then}")
    for name in sorted({*content.start, *manifest.content.start}):
        if content.start.get(name) != manifest.content.start.get(name):
            given = f"{config.init_adapter or 'nothing'} (another {name})"
            raise SettingError("init_adapter", given, f"the adapter {then}")
    for name, file in code_of(config).items():
        if content.code.get(name) != manifest.content.code.get(name, content.code.get(name)):
            setting = name.partition(".")[0]
            other = f"with other code begin another run: --init-adapter {checkpoint}"
            raise SettingError(setting, f"{file} (edited since)", f"the code {then}; {other}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "nothing"
    return "nothing" if value in (None, "") else str(value)
