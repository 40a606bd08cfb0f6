"""What parties keep on their own disks between rounds, so that it outlives any process.

In a simulation all of them lie in the run's folder; none reads what is another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit.lowrank import LowRank


class NotWritten(OSError):
    """Something could not be written, such as on a full disk; says what, and why."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while something is written into one error that names it.

    Args:
        path: What is written.

    Raises:
        NotWritten: The system, or the library that writes tensors, could not.
    """
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise NotWritten(f"{path} could not be written ({reason}); what was there before is whole") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Writes a file of tensors, and of facts in words, whole or not at all, and to the disk before it returns."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    # Copies, since the format knows no two tensors that share memory, and a strategy may return such.
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(apart, draft, metadata=None if facts is None else dict(facts))
            sync(draft)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def round_of(path: Path) -> int | None:
    """The round that a file or folder named round-NNNN is of; None where its name says no number."""
    found = re.fullmatch(r"round-(\d+)(\.safetensors)?", path.name, re.ASCII)
    return int(found[1]) if found else None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of tensors."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file as they lie there, which processes share and load as they use them; and its facts."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping


def pack(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Groups of tensors as one, named "group/name"."""
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `pack`; a group without tensors is not there."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def pack_changes(changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Changes of weights by layer as tensors."""
    ups = {layer: change.up for layer, change in changes.items()}
    return pack({"up": ups, "down": {layer: change.down for layer, change in changes.items()}})


def unpack_changes(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The inverse of `pack_changes`."""
    groups = unpack(tensors)
    return {layer: LowRank(up, groups["down"][layer]) for layer, up in groups.get("up", {}).items()}


class LostState(Exception):
    """A client's disk does not hold what it must; says where."""


@dataclass(frozen=True)
class Kept:
    """What a client keeps of a round.

    Attributes:
        held: Shared factors that it was given and did not train, where they are no longer those of the start.
        personal: Factors that never leave it.
        control: Its control variate.
        moments: What its optimiser remembers.
        stage: State of the strategy's own gradient stage.
    """

    held: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    stage: Mapping[str, Tensor] = field(default_factory=dict)


class ClientStore:
    """A client's own folder: a file for its newest round, and one for the last that the server has accepted."""

    def __init__(self, root: Path, client: int) -> None:
        """Names the folder; nothing is made before there is something to keep."""
        self._folder = root / f"{client:04d}"

    def load(self, round: int) -> Kept:
        """What was kept of that round; nothing of a client that never has anything to keep.

        Raises:
            LostState: There is something of other rounds, and nothing of this one.
        """
        path = self._path(round)
        if path.exists():
            return Kept(**unpack(load_tensors(path)))
        if round and self._folder.exists():
            raise LostState(f"{self._folder} has nothing of round {round}, which the server has accepted")
        return Kept()

    def save(self, round: int, kept: Kept, accepted: int) -> None:
        """Keeps what a round leaves.

        Args:
            round: The round.
            kept: What it leaves.
            accepted: The last round that the server has accepted, which is kept until this one is; others go.
        """
        tensors = pack({group.name: getattr(kept, group.name) for group in dataclasses.fields(Kept)})
        if tensors and accepted and not self._folder.exists():  # nothing was kept of it, which is not lost
            write_tensors(self._path(accepted), {})
        if tensors or self._folder.exists():
            write_tensors(self._path(round), tensors)
        for path in self._folder.glob("round-*.safetensors"):
            if path not in (self._path(round), self._path(accepted)):
                path.unlink()

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.safetensors"


class FoldLog:
    """What was folded into base weights, round by round, since it must be done again in the same order."""

    def __init__(self, folder: Path) -> None:
        """Names the folder."""
        self._folder = folder

    def append(self, round: int, changes: Mapping[str, LowRank]) -> None:
        """Remembers the changes (out, in) of a round by layer, in place of those of an attempt that was given up."""
        write_tensors(self._path(round), pack_changes(changes))

    def forget(self, after: int) -> None:
        """Drops the rounds after one, which will be made again."""
        for path in self._folder.glob("round-*.safetensors"):
            if (number := round_of(path)) is not None and number > after:
                path.unlink()

    def read(self, round: int) -> dict[str, LowRank]:
        """The changes of a round; none, if it had none."""
        path = self._path(round)
        return unpack_changes(load_tensors(path)) if path.exists() else {}

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.safetensors"
