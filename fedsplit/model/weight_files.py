"""Files of a folder that hold a model's weights: exactly those that transformers' `from_pretrained` would load."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import safe_open

from fedsplit.allowed import SettingError

WEIGHTS = "model.safetensors"
"""The file of a model that is not sharded. It goes before an index."""

INDEX = "model.safetensors.index.json"
"""The index of a sharded model: the names of its shards, and the shard of each tensor."""

ADAPTER = "adapter_config.json"
"""PEFT's configuration. transformers adds an adapter that lies beside a model to the model's weights."""

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""A file of torch's distributed checkpoints. transformers loads them before any other file."""

_OTHERS = (".safetensors", ".bin", ".pt", ".gguf")
"""Endings of other files with weights, which an error mentions."""


def check_weight_files(folder: Path, allowed: str) -> None:
    """Refuses a folder without weights in safetensors, or with files that change what transformers loads from it.

    Args:
        folder: The model's folder.
        allowed: What the setting `model` may be, in words.

    Raises:
        SettingError: The folder has no weights under the names that transformers looks for, or has others that
            transformers would load in their place or on top of them.
    """
    if reason := _flaw(folder):
        raise SettingError("model", f"{folder} ({reason})", allowed)


def _flaw(folder: Path) -> str:
    """Returns the reason why a folder's weights cannot be taken; empty if there is none."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    if ADAPTER in names:
        return f"{ADAPTER} in it: transformers would add that adapter to the weights; merge it, or move it elsewhere"
    if distributed := [name for name in names if _DISTRIBUTED.fullmatch(name)]:
        return f"{distributed[0]} in it, a part of a distributed checkpoint; save the model with save_pretrained"
    if WEIGHTS in names or INDEX in names:
        return ""
    others = [name for ending in _OTHERS for name in names if name.endswith(ending)]
    return f"neither {WEIGHTS} nor {INDEX} in it" + (f", only {others[0]}" if others else "")


def find_tensors(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor of a checkpoint.

    Of an index, transformers uses the names of the shards alone: a tensor lies where a shard has it, and the last of
    several shards wins. A party fetches only the shards that it needs. The index says what the other shards hold.

    Args:
        folder: The model's folder.

    Returns:
        Files by the name that a tensor has in them. Shards that the folder lacks are among them.

    Raises:
        ValueError: The folder has no weights, or its index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    weight_map = _weight_map(folder)
    found = {tensor: shard for tensor, shard in weight_map.items() if not shard.is_file()}
    for shard in sorted({*weight_map.values()}):
        if shard.is_file():
            found |= dict.fromkeys(_names(shard), shard)
    return found


def _weight_map(folder: Path) -> dict[str, Path]:
    """Returns the shard of each tensor by the index, as transformers reads it."""
    from transformers.utils.hub import get_checkpoint_shard_files  # takes a second to import

    try:
        _, facts = get_checkpoint_shard_files(str(folder), str(folder / INDEX))
        return {tensor: folder / shard for tensor, shard in facts["weight_map"].items()}
    except KeyError as error:
        raise ValueError(f"its {INDEX} has no {error.args[0]}") from None
    except (TypeError, AttributeError, ValueError):
        raise ValueError(f"its {INDEX} cannot be read") from None


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
