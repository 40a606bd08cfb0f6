"""State of a client between rounds, on the client's disk, so that it survives the process that trained it.

In a simulation the disks of all clients lie in the run's folder. No client reads another client's disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedsplit.state.round_names import round_file
from fedsplit.tensor_files import load_tensors, pack, unpack, write_tensors


class LostState(Exception):
    """A client's disk lacks a file that must be there. The message names the file."""


@dataclass(frozen=True)
class ClientState:
    """State that a client keeps after a round.

    Attributes:
        held: Shared factors that the client received, did not train, and that differ from the initial ones.
        personal: Factors that never leave the client.
        control: The client's control variate.
        moments: State of the client's optimiser.
        stage: State of the strategy's own gradient stage.
        codec: State of the client's codec.
    """

    held: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    stage: Mapping[str, Tensor] = field(default_factory=dict)
    codec: Mapping[str, Tensor] = field(default_factory=dict)


class ClientStore:
    """Folder of one client, with the files of a few rounds.

    These are the newest round, the last round that the server accepted, and those that kept checkpoints go back to.

    Example:
        >>> import tempfile, torch
        >>> store = ClientStore(Path(tempfile.mkdtemp()), client=3)
        >>> store.save(1, ClientState(personal={"layer.lora_B": torch.ones(2)}), accepted=0)
        >>> store.load(1).personal["layer.lora_B"]
        tensor([1., 1.])
    """

    def __init__(self, root: Path, client: int) -> None:
        """Names the folder. It is created when there is something to save.

        Args:
            root: The folder of all clients' disks.
            client: Number of the client.
        """
        self.folder = root / f"{client:04d}"

    def load(self, round: int) -> ClientState:
        """Returns the state after a round. It is empty for a client that never saved anything.

        Raises:
            LostState: The folder has files, but none of this round.
        """
        path = round_file(self.folder, round)
        if path.exists():
            return ClientState(**unpack(load_tensors(path)))
        # Round 0 is the start, before which no client has saved anything.
        if round and self.folder.exists():
            raise LostState(f"{self.folder} has nothing of round {round}, which the server has accepted")
        return ClientState()

    def save(
        self,
        round: int,
        state: ClientState,
        accepted: int,
        kept: Collection[int] = (),
    ) -> None:
        """Saves the state after a round, and deletes the files of rounds that nobody goes back to.

        Args:
            round: The round that has just been trained.
            state: The client's state after it.
            accepted: The last round that the server accepted. Its file stays, since this round may be repeated.
            kept: Rounds that were the last accepted ones at the server's kept checkpoints. Their files stay, too.
        """
        groups = {group.name: getattr(state, group.name) for group in dataclasses.fields(ClientState)}
        tensors = pack(groups)

        # An earlier round without a file had an empty state. It gets an empty file, so that `load` does not take
        # it for a lost one once the folder exists.
        earlier = {accepted, *kept} - {0}
        if tensors and not self.folder.exists():
            for needed in sorted(earlier):
                write_tensors(round_file(self.folder, needed), {})
        if tensors or self.folder.exists():
            write_tensors(round_file(self.folder, round), tensors)

        current = {round_file(self.folder, needed) for needed in (*earlier, round)}
        # After the new file is written: a process that is killed in between leaves a file too many, and none too few.
        for path in self.folder.glob("round-*.safetensors"):
            if path not in current:
                path.unlink()
