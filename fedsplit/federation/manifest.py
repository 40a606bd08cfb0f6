"""The manifest of a checkpoint: settings, data, model and versions of the run, and a digest of every needed file.

A run may go on only from its own files. Errors name the difference: a damaged file, a file of another round, or a
changed setting, data set or model.
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
"""Name of the manifest in a checkpoint's folder."""

MAY_CHANGE = frozenset({*MAY_DIFFER, "data.show", "trunk.lanes", "trunk.memory", "trunk.lease"})
"""Settings that may change when a run goes on: its length, and its use of the machine."""

BY_CONTENT = frozenset({"model", "dataset", "data.held_out", "init_adapter"})
"""Settings that name files. The content of the files must not change; their place may."""


class Damaged(Exception):
    """A checkpoint has changed since it was written. The message says how."""


@dataclass(frozen=True)
class Content:
    """Digests of a run's inputs beside the settings.

    Attributes:
        data: Digest of all clients' data, divided among the clients.
        model: Digests of the base model's files, by name.
        start: Digests of the files of the initial adapter, by name; empty without an initial adapter.
        code: Digests of the user's files with strategy, objective and metrics, by setting, such as "strategy" or
            "metric.rouge". Modules that the files import do not count.
    """

    data: str
    model: Mapping[str, str]
    start: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Contents of a manifest.

    Attributes:
        round: Round of the checkpoint.
        settings: Settings that decide the result of the run, by dotted name.
        content: Digests of the run's inputs.
        files: Digests of the files in the checkpoint's folder, by path in the folder.
        elsewhere: Digests of further files that the run needs to go on, by path in the run's folder.
        versions: Versions of Python and of the libraries that computed the round, by name.
    """

    round: int
    settings: Mapping[str, Any]
    content: Content
    files: Mapping[str, str]
    elsewhere: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)


def digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_of(config: Config) -> dict[str, Path]:
    """Returns the user's files in the settings, by setting. Sinks are left out, since no result depends on them.

    Example:
        >>> code_of(Config(strategy="my/mine.py:Mine", metric=("token_accuracy", "my/mine.py:rouge")))
        {'strategy': PosixPath('my/mine.py'), 'metric.rouge': PosixPath('my/mine.py')}
    """
    specs = {"strategy": config.strategy, "objective": config.objective}
    specs |= {f"metric.{name_of(spec)}": spec for spec in config.metric}
    files = {setting: file_of(spec) for setting, spec in specs.items()}
    return {setting: file for setting, file in files.items() if file is not None}


def content_of(
    shards: Sequence[Shard],
    about: Path,
    weights: Path,
    start: str = "",
    code: Mapping[str, Path] | None = None,
) -> Content:
    """Returns digests of a run's data, model, initial adapter and code.

    Args:
        shards: Data by client.
        about: Folder of the model's config.json.
        weights: Folder of the model's weights. All weights are read.
        start: Folder of the initial adapter; empty for none.
        code: The user's files by setting, in the form of `code_of`.
    """
    # A set: one file holds many tensors, and is read once.
    files = {about / "config.json", *find_tensors(weights).values()}
    adapter = sorted(Path(start).glob("adapter_*")) if start else []  # no README
    of_model = {file.name: digest(file) for file in sorted(files)}
    of_start = {file.name: digest(file) for file in adapter}
    of_code = {setting: digest(file) for setting, file in (code or {}).items()}
    return Content(_digest_of_shards(shards), of_model, of_start, of_code)


def _digest_of_shards(shards: Iterable[Shard]) -> str:
    """Returns one digest of all clients' data, so that the server keeps no digest of a single client's text."""
    found = hashlib.sha256()
    for shard in shards:
        # As JSON: plainly joined, a name could run into what follows.
        found.update(json.dumps([shard.name, shard.classes]).encode())
        for rows in (shard.train, shard.held_out):
            for entry in fields(rows):
                value = getattr(rows, entry.name)
                if isinstance(value, Tensor):
                    # With type and shape: equal bytes can be different data.
                    found.update(f"{entry.name} {value.dtype} {tuple(value.shape)}".encode())
                    as_bytes = value.contiguous().flatten().view(torch.uint8)
                    found.update(as_bytes.numpy().data)
    return found.hexdigest()


def settings_of(config: Config) -> dict[str, Any]:
    """Returns the settings that decide the result of a run, by dotted name."""
    document = as_document(config)
    options = {}
    for setting, table in OPTIONS.items():
        for name, value in document.pop(table).items():
            options[f"{setting}.{name}"] = value

    may_change = MAY_CHANGE | BY_CONTENT
    deciding = {}
    for name, value in {**dotted(document), **options}.items():
        section, _, _ = name.partition(".")  # of sinks.MySink.project, `sinks` may change
        if name not in may_change and section not in may_change:
            deciding[name] = value
    # Through JSON, for a comparison with settings from a manifest: a tuple becomes a list.
    settings: dict[str, Any] = json.loads(json.dumps(deciding))
    return settings


def write(
    folder: Path,
    round: int,
    config: Config,
    content: Content,
    elsewhere: Mapping[str, str],
) -> None:
    """Writes the manifest of a checkpoint's folder, which already has all other files."""
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
    """Returns the digest of a manifest's values, by which damage to the manifest itself is found."""
    values = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _files_in(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint, without the manifest and without hidden files, which nobody reads."""
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and path != folder / NAME and not is_hidden:
            files.append(path)
    return files


def read(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint's folder.

    Raises:
        Damaged: The manifest is missing, cannot be read or has changed.
    """
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
        held = document["content"]
        content = Content(
            data=str(held["data"]),
            model=dict(held["model"]),
            # Manifests of older versions may lack this entry and the next one.
            start=dict(held.get("init_adapter", {})),
            code=dict(held.get("code", {})),
        )
        is_whole = document["sha256"] == _digest_of_itself(document)
        written = Manifest(
            round=int(document["round"]),
            settings=dict(document["settings"]),
            content=content,
            files=dict(document["files"]),
            elsewhere=dict(document["elsewhere"]),
            versions=dict(document["versions"]),
        )
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}, without which nobody knows whether it is whole") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise Damaged(f"its {NAME} cannot be read ({reason})") from None
    if not is_whole:
        raise Damaged(f"{NAME} is not as it was written")
    return written


def check_whole(folder: Path, round: int) -> Manifest:
    """Checks that a checkpoint's folder holds all its files unchanged, and returns the manifest.

    Files that the manifest does not list are ignored. Nobody reads such files, so that no result depends on them, and
    a note that somebody puts into the folder does not damage the checkpoint.

    Args:
        folder: The folder.
        round: Round by the name of the folder.

    Raises:
        Damaged: The manifest is of another round, or a file is missing or has changed.
    """
    manifest = read(folder)
    if manifest.round != round:
        raise Damaged(f"it is that of round {manifest.round}")
    # First, since a missing file is found without reading the others.
    for name in sorted(manifest.files):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is not there")
    _check_files(folder, manifest.files)
    return manifest


def check_elsewhere(run: Path, manifest: Manifest) -> None:
    """Checks the files of a run outside a checkpoint's folder.

    Raises:
        Damaged: A file is missing or has changed.
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
    """Checks that a run goes on with its original settings.

    A setting that the manifest lacks did not exist when the run began. The default counts as the original value.

    Raises:
        SettingError: A setting has changed that decides the result.
    """
    now = settings_of(config)
    then = {**settings_of(Config()), **manifest.settings}
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            words = f"{_shown(then.get(name))}, with which the run in {run} came to round {manifest.round}"
            raise SettingError(name, _shown(now.get(name)), words)


def check_content(
    manifest: Manifest,
    content: Content,
    config: Config,
    run: Path,
    checkpoint: Path,
) -> None:
    """Checks that a run goes on with its original data, model, initial adapter and code.

    A manifest of an older version has no digests of code. Code is not checked then.

    Raises:
        SettingError: The data, the model, the initial adapter or the code has changed.
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
        digest_now = content.code.get(name)
        digest_then = manifest.content.code.get(name, digest_now)  # an older manifest has no digests of code
        if digest_now != digest_then:
            setting = name.partition(".")[0]
            other = f"with other code begin another run: --init-adapter {checkpoint}"
            raise SettingError(setting, f"{file} (edited since)", f"the code {then}; {other}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "nothing"
    return "nothing" if value in (None, "") else str(value)
