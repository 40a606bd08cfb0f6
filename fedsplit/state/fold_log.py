"""Log of the changes that were folded into base weights, one file a round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedsplit.lowrank import LowRank
from fedsplit.state.round_names import round_file, round_of
from fedsplit.tensor_files import load_tensors, pack_changes, unpack_changes, write_tensors

FOLDS = "folds"
"""Folder of a log, in the folder of the clients' disks and beside the checkpoints."""


class FoldLog:
    """Changes of base weights by round. A restarted process replays them in the same order, and gets the same weights.

    Example:
        >>> import tempfile, torch
        >>> log = FoldLog(Path(tempfile.mkdtemp()))
        >>> log.append(1, {"layer": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
        >>> list(log.read(1)), log.read(2)
        (['layer'], {})
    """

    def __init__(self, folder: Path) -> None:
        """Names the folder. It is created by the first `append`."""
        self._folder = folder

    def append(self, round: int, changes: Mapping[str, LowRank]) -> None:
        """Writes the changes (out, in) of a round by layer. A repeated round replaces its first attempt."""
        write_tensors(round_file(self._folder, round), pack_changes(changes))

    def restore(self, round: int, changes: Mapping[str, LowRank]) -> None:
        """Writes the changes of a round that should be there, unless they are."""
        if changes and not round_file(self._folder, round).exists():
            self.append(round, changes)

    def forget(self, after: int) -> None:
        """Deletes the changes of all rounds later than `after`."""
        for path in self._folder.glob("round-*.safetensors"):
            number = round_of(path)
            if number is not None and number > after:
                path.unlink()

    def read(self, round: int) -> dict[str, LowRank]:
        """Returns the changes of a round by layer. A round without a file had none."""
        path = round_file(self._folder, round)
        return unpack_changes(load_tensors(path)) if path.exists() else {}
