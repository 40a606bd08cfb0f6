"""A codec that leaves each tensor to one of several codecs, by the tensor's kind and direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsplit.wire.codecs import Codec, Role
from fedsplit.wire.encoded import Encoded


class ByRole(Codec):
    """Encodes by a codec for each kind and direction, such as exactly towards one neighbour and rounded to the other.

    Example:
        >>> import torch
        >>> from fedsplit.wire.codecs import make_codec
        >>> from fedsplit.wire.packets import StepKey
        >>> raw, short = make_codec("raw"), make_codec("bf16")
        >>> codec = ByRole({("activation", "up"): raw, ("activation", "down"): short}, short, "above")
        >>> key = StepKey(round=1, client=0, step=0)
        >>> for direction in ("up", "down"):
        ...     print(codec.encode(torch.ones(2, 3), Role("activation", direction, key)).nbytes)
        24
        12
    """

    def __init__(self, codecs: Mapping[tuple[str, str], Codec], stateful: Codec, side: str) -> None:
        """Joins codecs.

        Args:
            codecs: Codecs by kind and direction.
            stateful: The only codec among them that may keep state.
            side: Name of the side on which the stateful codec works. The name tells states of several sides apart.
        """
        self._codecs = codecs
        self._stateful = stateful
        self._prefix = f"{side}/"

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor by the codec of the role."""
        return self._codecs[role.kind, role.direction].encode(tensor, role)

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor by the codec of the role."""
        return self._codecs[role.kind, role.direction].decode(encoded, role)

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the state of the stateful codec, under names with the side."""
        states = {}
        for client, state in self._stateful.state().items():
            states[client] = {self._prefix + name: value for name, value in state.items()}
        return states

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces the state of the stateful codec. States of further sides are ignored."""
        of_side: dict[int, dict[str, Tensor]] = {}
        for client, state in states.items():
            for name, value in state.items():
                if name.startswith(self._prefix):
                    of_side.setdefault(client, {})[name.removeprefix(self._prefix)] = value
        self._stateful.restore(of_side)
