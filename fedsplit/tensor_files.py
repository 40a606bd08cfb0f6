"""Files of named tensors (safetensors), written durably; and groups of tensors under flat names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from fedsplit.durable import replacing
from fedsplit.lowrank import LowRank


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Replaces a file of tensors in one step. The file is on the disk when the call returns.

    Args:
        path: The file. Missing folders are created.
        tensors: The tensors by name.
        facts: Text values to store in the file's header.

    Raises:
        NotWritten: The file could not be written. The previous version is unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> write_tensors(path, {"lora_B": torch.zeros(2)})
        >>> load_tensors(path)
        {'lora_B': tensor([0., 0.])}
    """
    copies = _copies(tensors)
    metadata = None if facts is None else dict(facts)

    with replacing(path) as draft:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, draft, metadata=metadata)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of every tensor: safetensors refuses tensors that share memory or have gaps.

    A strategy may return both.
    """
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copies


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns tensors as the bytes of a file of tensors.

    Example:
        >>> tensors_from_bytes(tensors_as_bytes({"lora_B": torch.zeros(2)}))
        {'lora_B': tensor([0., 0.])}
    """
    data: bytes = save(_copies(tensors))
    return data


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Returns the tensors in the bytes of a file of tensors.

    Raises:
        ValueError: The bytes do not hold tensors, or not all of them.
    """
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, KeyError) as error:  # a KeyError for a type that torch does not have
        raise ValueError(str(error)) from error
    return tensors


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of tensors.

    The file is read and not mapped: safetensors 0.8.0 loses some 64 bytes of memory with every tensor of a mapped file,
    and a run reads the states of its clients in every round.
    """
    tensors: dict[str, Tensor] = load(path.read_bytes())
    return tensors


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps a file of tensors into memory. Pages are read on first use, and processes share them.

    Returns:
        The tensors by name, and the text values of the file's header.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file does not hold tensors, or not all of them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def pack(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Flattens groups of tensors into one mapping with names of the form "group/name".

    Example:
        >>> list(pack({"personal": {"l.lora_A": torch.ones(1)}, "control": {"l.lora_A": torch.ones(1)}}))
        ['personal/l.lora_A', 'control/l.lora_A']
    """
    flat = {}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            flat[f"{group}/{name}"] = tensor
    return flat


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Restores the groups that `pack` flattened. Empty groups are lost.

    Example:
        >>> unpack({"control/l.lora_A": torch.ones(1)})
        {'control': {'l.lora_A': tensor([1.])}}
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def pack_changes(changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Flattens low-rank changes of weights, by layer, into tensors named "up/layer" and "down/layer"."""
    ups = {layer: change.up for layer, change in changes.items()}
    downs = {layer: change.down for layer, change in changes.items()}
    return pack({"up": ups, "down": downs})


def unpack_changes(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """Restores the changes that `pack_changes` flattened."""
    groups = unpack(tensors)
    ups = groups.get("up", {})
    downs = groups.get("down", {})
    return {layer: LowRank(up, downs[layer]) for layer, up in ups.items()}
