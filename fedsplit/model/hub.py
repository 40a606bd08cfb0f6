"""Fetches models of the Hugging Face Hub into the local cache.

The usual environment variables apply: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. The Hub is not asked for newer
versions of cached files, since all processes of a run, and a later resumed run, must read the same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fedsplit.errors import SettingError, first_line
from fedsplit.model.vocabulary import TOKENIZER_FILES, has_vocabulary
from fedsplit.model.weight_files import ADAPTER, INDEX, WEIGHTS

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*|[A-Za-z0-9](?:[\w-]{0,94}\w)?)(?:@([\w./-]+))?", re.ASCII)
"""Matches names on the Hub. A name without an organisation, such as gpt2, has no dot, unlike most names of files."""

_SMALL = ("config.json", "generation_config.json", INDEX, ADAPTER, *TOKENIZER_FILES)

ALLOWED = "a folder that is there, or a model of the Hub that you may read, as org/name or org/name@revision"
"""Describes the models that can be fetched, for error messages."""


@dataclass(frozen=True)
class HubName:
    """Name of a model on the Hub.

    Attributes:
        repository: "org/name", or "name" for a model without an organisation.
        revision: Branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def parse(name: str) -> HubName | None:
    """Parses "org/name" or "name", with or without "@revision". Returns None for any other text.

    Example:
        >>> parse("org/name@v1")
        HubName(repository='org/name', revision='v1')
        >>> parse("gpt2"), parse("model.safetensors")
        (HubName(repository='gpt2', revision=None), None)
    """
    match = _ID.fullmatch(name)
    return HubName(match[1], match[2]) if match else None


def _reason(error: Exception, name: HubName) -> str:
    """Explains an error of the Hub's library in one line."""
    # First, since the error of a restricted repository is also one of a repository that is not found.
    if isinstance(error, GatedRepoError):
        return "access to it is restricted: ask for it on its page, then set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no revision {name.revision} of it"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder; and the Hub has no such model, or HF_TOKEN does not allow to read it"
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "no such folder; not all of it is in the Hub's cache, and HF_HUB_OFFLINE=1 forbids to ask the Hub"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError) or "Connect" in type(error).__name__:
        return "no such folder; not all of it is in the Hub's cache, and the Hub cannot be reached"
    return first_line(error)


def _download(name: HubName, revision: str | None, files: Collection[str]) -> Path:
    """Downloads the files that exist in the repository. Returns the cache folder of the commit.

    Raises:
        SettingError: The download failed.
    """
    try:
        return Path(snapshot_download(name.repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # noqa: BLE001  # the library lets the errors of its transport through
        raise SettingError("model", f"{name} ({_reason(error, name)})", ALLOWED) from None


def _has(name: HubName, revision: str, file: str) -> bool:
    """Returns True if the repository has a file at a commit.

    Raises:
        SettingError: The Hub cannot be asked.
    """
    try:
        return HfApi().file_exists(name.repository, file, revision=revision)
    except Exception as error:  # noqa: BLE001  # the library lets the errors of its transport through
        raise SettingError("model", f"{name} ({_reason(error, name)})", ALLOWED) from None


def config_folder(name: HubName) -> Path:
    """Returns the cache folder of a commit, with config.json and tokenizer. The folder is named after the commit.

    Raises:
        SettingError: The files cannot be fetched, or the repository has no config.json, or has an adapter.
    """
    try:
        # First the cache alone: files of a cached commit are used even if the branch has moved on.
        cached = snapshot_download(
            name.repository, revision=name.revision, allow_patterns=list(_SMALL), local_files_only=True
        )
    except LocalEntryNotFoundError:
        cached = ""
    folder = Path(cached)
    is_whole = bool(cached) and (folder / "config.json").is_file() and has_vocabulary(folder)
    if not is_whole:  # a second program may have cached some of the files
        folder = _download(name, name.revision, _SMALL)
    if not (folder / "config.json").is_file():
        raise SettingError("model", f"{name} (no config.json in it)", ALLOWED)
    if (folder / ADAPTER).is_file():
        raise SettingError("model", f"{name} ({ADAPTER} in it: transformers would add that adapter)", ALLOWED)
    return folder


def fetch_weights(
    name: HubName,
    folder: Path,
    wanted: Callable[[str], bool],
    tell: Callable[[str], object] = lambda line: None,
) -> None:
    """Fetches missing weights of a model into the cache folder of a commit.

    A repository may have both a single file and shards. transformers then prefers the single file, so the single file
    is fetched.

    Args:
        name: The model.
        folder: Result of `config_folder`.
        wanted: Called with the name of a tensor; returns True for a needed tensor. Shards without a needed tensor are
            not fetched.
        tell: Called with a line of text before a download, which may take long.

    Raises:
        SettingError: The weights cannot be fetched, or the repository has no weights in safetensors.
    """
    if (folder / WEIGHTS).exists():
        return
    if not (folder / INDEX).exists():
        tell(f"fetching the weights of {name}")
        # By the commit, which gives the folder its name: the weights must belong to the configuration that was read.
        _download(name, folder.name, (INDEX, WEIGHTS))
        if (folder / WEIGHTS).exists():
            return

    files = [WEIGHTS]
    if (folder / INDEX).exists():
        files = _shards(name, folder / INDEX, wanted)
    missing = [file for file in files if not (folder / file).exists()]
    if missing and missing != [WEIGHTS] and _has(name, folder.name, WEIGHTS):
        missing = [WEIGHTS]  # the single file that transformers prefers
    if missing:
        which = "" if missing == [WEIGHTS] else f": {', '.join(missing)}"
        tell(f"fetching the weights of {name}{which}")
        _download(name, folder.name, missing)
    absent = [file for file in missing if not (folder / file).exists()]
    if absent:
        raise SettingError("model", f"{name} (no {absent[0]} in it)", "a model whose weights are in safetensors")


def _shards(name: HubName, index: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Returns the names of the shards that hold a needed tensor.

    Raises:
        SettingError: The index cannot be read.
    """
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = document["weight_map"]
        return sorted({file for tensor, file in weight_map.items() if wanted(tensor)})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingError("model", f"{name} (its {INDEX} cannot be read)", ALLOWED) from None
