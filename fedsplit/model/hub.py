"""A model of the Hugging Face Hub to a folder on this machine.

Where it lies, who asks for it and whether the Hub may be asked at all is up to the environment, as everywhere:
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. What the cache has is taken as it is, and the Hub is not asked whether
it has something newer: all processes of a run must see the same files, and those of tomorrow, too.
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

from fedsplit.allowed import SettingError
from fedsplit.model.vocabulary import TOKENIZER_FILES, has_vocabulary
from fedsplit.model.weight_files import ADAPTER, INDEX, WEIGHTS

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?", re.ASCII)

_SMALL = ("config.json", "generation_config.json", INDEX, ADAPTER, *TOKENIZER_FILES)

ALLOWED = "a folder that is there, or a model of the Hub that you may read, as org/name or org/name@revision"
"""In words, for errors."""


@dataclass(frozen=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repository: "org/name".
        revision: A branch, tag or commit; the main branch where None.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def parse(name: str) -> HubName | None:
    """Reads org/name or org/name@revision; None where it is neither."""
    found = _ID.fullmatch(name)
    return HubName(found[1], found[2]) if found else None


def _reason(error: Exception, name: HubName) -> str:
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
    return (str(error).splitlines() or [type(error).__name__])[0]


def _download(name: HubName, revision: str | None, files: Collection[str]) -> Path:
    """The folder of a commit, with those of some files that the repository has.

    Raises:
        SettingError: They cannot be had.
    """
    try:
        return Path(snapshot_download(name.repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # noqa: BLE001  # the library lets the errors of its transport through
        raise SettingError("model", f"{name} ({_reason(error, name)})", ALLOWED) from None


def _has(name: HubName, revision: str, file: str) -> bool:
    """Returns whether the repository has a file at a commit.

    Raises:
        SettingError: The Hub does not say.
    """
    try:
        return HfApi().file_exists(name.repository, file, revision=revision)
    except Exception as error:  # noqa: BLE001  # the library lets the errors of its transport through
        raise SettingError("model", f"{name} ({_reason(error, name)})", ALLOWED) from None


def config_folder(name: HubName) -> Path:
    """The folder of a commit, with config.json and tokenizer; its name is the commit.

    Raises:
        SettingError: They cannot be had, or the repository has no config.json.
    """
    try:
        cached = snapshot_download(
            name.repository, revision=name.revision, allow_patterns=list(_SMALL), local_files_only=True
        )
    except LocalEntryNotFoundError:
        cached = ""
    folder = Path(cached)
    if not (cached and (folder / "config.json").is_file() and has_vocabulary(folder)):
        folder = _download(name, name.revision, _SMALL)
    if not (folder / "config.json").is_file():
        raise SettingError("model", f"{name} (no config.json in it)", ALLOWED)
    if (folder / ADAPTER).is_file():
        raise SettingError("model", f"{name} ({ADAPTER} in it: transformers would add that adapter)", ALLOWED)
    return folder


def fetch_weights(
    name: HubName, folder: Path, wanted: Callable[[str], bool], tell: Callable[[str], object] = lambda line: None
) -> None:
    """Makes sure that weights lie in the folder of a commit.

    Where the repository has both, transformers loads the single file and not the shards. What the cache has is taken
    without asking.

    Args:
        name: The model.
        folder: As `about` gave it.
        wanted: Whether a tensor of that name is needed; shards that have none such are not fetched.
        tell: Is told before anything is fetched, which may take long.

    Raises:
        SettingError: They cannot be had, or the repository has none in safetensors.
    """
    if (folder / WEIGHTS).exists():
        return
    if not (folder / INDEX).exists():
        tell(f"fetching the weights of {name}")
        _download(name, folder.name, (INDEX, WEIGHTS))  # it has one of them at least
        if (folder / WEIGHTS).exists():
            return
    files = _shards(name, folder / INDEX, wanted) if (folder / INDEX).exists() else [WEIGHTS]
    missing = [file for file in files if not (folder / file).exists()]
    if missing and missing != [WEIGHTS] and _has(name, folder.name, WEIGHTS):
        missing = [WEIGHTS]
    if missing:
        which = "" if missing == [WEIGHTS] else f": {', '.join(missing)}"
        tell(f"fetching the weights of {name}{which}")
        _download(name, folder.name, missing)
    if missing := [file for file in missing if not (folder / file).exists()]:
        raise SettingError("model", f"{name} (no {missing[0]} in it)", "a model whose weights are in safetensors")


def _shards(name: HubName, index: Path, wanted: Callable[[str], bool]) -> list[str]:
    """The files that the tensors asked for lie in."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({file for tensor, file in weight_map.items() if wanted(tensor)})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingError("model", f"{name} (its {INDEX} cannot be read)", ALLOWED) from None
