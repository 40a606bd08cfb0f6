"""Finds the weight files in a model's folder: the files that transformers' `from_pretrained` loads."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import safe_open

from fedsplit.errors import SettingError, shortened

WEIGHTS = "model.safetensors"
"""Weight file of a model without shards. If a folder has both this file and an index, the index is ignored."""

INDEX = "model.safetensors.index.json"
"""Index of a sharded model: the names of the shards, and the shard of each tensor."""

ADAPTER = "adapter_config.json"
"""Configuration file of a PEFT adapter. transformers adds an adapter in a model's folder to the model's weights."""

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of files of torch's distributed checkpoints. transformers prefers these files to all further files."""

_OTHERS = (".safetensors", ".bin", ".pt", ".gguf")
"""Endings of further weight files, for an error message. The files are not loaded."""


def check_weight_files(folder: Path, allowed: str) -> None:
    """Checks that a folder has weights in safetensors, and no further files that transformers would load.

    Args:
        folder: Folder of the model.
        allowed: Description of the possible values of the setting `model`, for the error.

    Raises:
        SettingError: The folder has no weights under the names that transformers looks for, or has further files that
            transformers would load in addition or instead.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> check_weight_files(BUNDLED_MODEL, allowed="a folder with a model")
    """
    reason = _flaw(folder)
    if reason:
        raise SettingError("model", f"{folder} ({reason})", allowed)


def _flaw(folder: Path) -> str:
    """Returns the reason why a folder is refused; empty if it is accepted."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    if ADAPTER in names:
        return f"{ADAPTER} in it: transformers would add that adapter to the weights; merge it, or move it elsewhere"
    distributed = [name for name in names if _DISTRIBUTED.fullmatch(name)]
    if distributed:
        return f"{distributed[0]} in it, a part of a distributed checkpoint; save the model with save_pretrained"
    if WEIGHTS in names or INDEX in names:
        return ""
    others = [name for ending in _OTHERS for name in names if name.endswith(ending)]
    return f"neither {WEIGHTS} nor {INDEX} in it" + (f", only {others[0]}" if others else "")


def find_tensors(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor of a checkpoint.

    transformers reads only the names of the shards from an index, and loads every tensor of each shard. Of several
    shards with the same tensor, the last shard wins. A party fetches only the needed shards; for missing shards, the
    index is believed.

    Args:
        folder: Folder of the model.

    Returns:
        Files by tensor name, including shards that the folder lacks.

    Raises:
        ValueError: The folder has no weights, or the index cannot be read.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> find_tensors(BUNDLED_MODEL)["transformer.wte.weight"].name
        'model.safetensors'
    """
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    weight_map = _weight_map(folder)
    files = {tensor: shard for tensor, shard in weight_map.items() if not shard.is_file()}
    for shard in sorted({*weight_map.values()}):
        if shard.is_file():
            files |= dict.fromkeys(_names(shard), shard)
    return files


def _weight_map(folder: Path) -> dict[str, Path]:
    """Returns the shard of each tensor according to the index. transformers reads the index.

    Raises:
        ValueError: The index cannot be read, or names a file outside of the folder.
    """
    from transformers.utils.hub import get_checkpoint_shard_files  # takes a second to import

    try:
        _, facts = get_checkpoint_shard_files(str(folder), str(folder / INDEX))
        shards = facts["weight_map"]
        # An index comes from a stranger, and must not make a run read any file of this machine.
        outside = sorted(shard for shard in shards.values() if _leaves_folder(Path(shard)))
        if not outside:
            return {tensor: folder / shard for tensor, shard in shards.items()}
    except KeyError as error:
        raise ValueError(f"its {INDEX} has no {error.args[0]}") from None
    except (TypeError, AttributeError, ValueError):
        raise ValueError(f"its {INDEX} cannot be read") from None
    raise ValueError(f"its {INDEX} names {shortened(outside[0])}, which is not in the folder")


def _leaves_folder(path: Path) -> bool:
    """Returns True if a path in an index may name a file outside of the model's folder."""
    return path.is_absolute() or ".." in path.parts


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
