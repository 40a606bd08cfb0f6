"""Adapters between server and clients through a codec (`--adapter.codec`).

Up, a client sends the change of each tensor since the start of the round. Down, the server sends values. Both sides go
on with the decoded values, so that all parties agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from fedsplit.settings.chains import parse_chain, parts_of
from fedsplit.wire.blobs import from_blob, to_blob
from fedsplit.wire.codecs import MOST_VALUES, Role, make_codec
from fedsplit.wire.encoded import MalformedPacket
from fedsplit.wire.packets import StepKey

_STATE = "adapter/"
"""Prefix of the state's names in a client's store."""


class AdapterCodec:
    """Encodes adapters on the way up and down. A client and the server have a codec each.

    Only the client keeps state: what its changes have lost (`fedsplit.wire.top_k`).

    Example:
        >>> import torch
        >>> names = ["h.0.lora_A.weight"]
        >>> client, server = AdapterCodec("int8", 0, names), AdapterCodec("int8", 0, names)
        >>> given = {names[0]: torch.ones(2, 2)}
        >>> sent = client.encode_changes({names[0]: torch.full((2, 2), 128.0)}, given, client=0, round=1)
        >>> server.decode_changes(sent, given, client=0, round=1)[names[0]]
        tensor([[128., 128.],
                [128., 128.]])
    """

    def __init__(self, text: str, seed: int, names: Iterable[str]) -> None:
        """Makes the codecs of both directions.

        Args:
            text: Codec, or chain of codecs.
            seed: Seed of the run.
            names: Names of all tensors that may cross. Both sides need the same names.
        """
        self._up = make_codec(text, seed)
        self._down = make_codec(values_chain(text), seed)
        # Sorted, so that client and server give a tensor the same place.
        self._places = {name: place for place, name in enumerate(sorted(names))}

    def encode_values(self, tensors: Mapping[str, Tensor], client: int, round: int) -> dict[str, Tensor]:
        """Returns adapters as blobs, for a client."""
        sent = {}
        for name, tensor in tensors.items():
            role = self._role(name, "down", client, round)
            sent[name] = to_blob(self._down.encode(tensor, role))
        return sent

    def decode_values(self, sent: Mapping[str, Tensor], client: int, round: int) -> dict[str, Tensor]:
        """Returns adapters from blobs, as the client and the server compute with them."""
        tensors = {}
        for name, blob in sent.items():
            encoded = from_blob(blob)
            role = self._role(name, "down", client, round)
            tensors[name] = self._down.decode(encoded, role)
        return tensors

    def encode_changes(
        self,
        trained: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        client: int,
        round: int,
    ) -> dict[str, Tensor]:
        """Returns the changes of a client's adapters as blobs, for the server.

        Args:
            trained: Tensors after the round, by name.
            given: Tensors before the round, with all names of `trained`.
            client: Number of the client.
            round: Number of the round.
        """
        sent = {}
        for name, tensor in trained.items():
            role = self._role(name, "up", client, round)
            sent[name] = to_blob(self._up.encode(tensor - given[name], role))
        return sent

    def decode_changes(
        self,
        sent: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        client: int,
        round: int,
    ) -> dict[str, Tensor]:
        """Returns a client's adapters from the changes that it sent.

        Raises:
            MalformedPacket: A blob is no change of a tensor that the client was given.
        """
        tensors = {}
        for name, blob in sent.items():
            if name not in given:
                raise MalformedPacket(f"a change of {name[:80]}, which the client was not given")
            role = self._role(name, "up", client, round, given[name].numel())
            change = self._up.decode(from_blob(blob), role)
            # The blob comes from a client and brings its own shape and type. Without this check, the sum below would
            # broadcast a smaller tensor, or turn the adapter into a wider type.
            if change.shape != given[name].shape or change.dtype != given[name].dtype:
                raise MalformedPacket(f"a change of {name[:80]} of another shape or type")
            tensors[name] = given[name] + change
        return tensors

    def state(self, client: int) -> dict[str, Tensor]:
        """Returns the state of a client, by names for the client's store."""
        of_client = self._up.state().get(client, {})
        return {_STATE + name: tensor for name, tensor in of_client.items()}

    def restore(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Replaces the state by what the client's store has kept. Names of other codecs are ignored."""
        own = {}
        for name, tensor in state.items():
            if name.startswith(_STATE):
                own[name.removeprefix(_STATE)] = tensor
        self._up.restore({client: own})

    def _role(
        self,
        name: str,
        direction: Literal["up", "down"],
        client: int,
        round: int,
        most: int = MOST_VALUES,
    ) -> Role:
        # Each tensor has a stream of its own, by its place among all names. A change is like a gradient: what is lost
        # may be sent later.
        key = StepKey(round, client, step=0, batch=self._places[name])
        return Role("gradient", direction, key, most=most)


def values_chain(text: str) -> str:
    """Returns the codecs of a chain that suit values: without those that leave most of a tensor out.

    Example:
        >>> values_chain("topk:0.1,int8,zstd"), values_chain("lowrank:2")
        ('int8,zstd', 'raw')
    """
    parts = zip(parts_of(text), parse_chain(text) or (), strict=True)
    return ",".join(part for part, link in parts if link.entry.place != "before") or "raw"
