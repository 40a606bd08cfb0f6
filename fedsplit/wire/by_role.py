"""A codec with one codec for each role: hidden states and gradients, up and down."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsplit.settings.chains import parse_chain
from fedsplit.settings.sections import WireSettings
from fedsplit.wire.codecs import Codec, Role, make_codec
from fedsplit.wire.encoded import Encoded

Roles = Mapping[tuple[str, str], Codec]
"""Codecs by kind and direction. No codec with state has two roles: `restore` gives a codec the state of one role."""


class ByRole(Codec):
    """Encodes by a codec for each kind and direction, such as coarsely on the way up and exactly on the way down.

    Example:
        >>> import torch
        >>> from fedsplit.wire.packets import StepKey
        >>> codec = ByRole({("activation", "up"): make_codec("raw"), ("activation", "down"): make_codec("bf16")})
        >>> key = StepKey(round=1, client=0, step=0)
        >>> for direction in ("up", "down"):
        ...     print(codec.encode(torch.ones(2, 3), Role("activation", direction, key)).nbytes)
        24
        12
    """

    def __init__(self, codecs: Roles) -> None:
        """Joins codecs."""
        self.codecs = codecs
        self.needs_examples = any(codec.needs_examples for codec in codecs.values())

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor by the codec of the role."""
        return self.codecs[role.kind, role.direction].encode(tensor, role)

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor by the codec of the role."""
        return self.codecs[role.kind, role.direction].decode(encoded, role)

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the state of all codecs. The names begin with kind and direction, so that no two are equal."""
        states: dict[int, dict[str, Tensor]] = {}
        for codec in self.codecs.values():
            for client, state in codec.state().items():
                states.setdefault(client, {}).update(state)
        return states

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces the state of each codec. State of roles without a codec is ignored."""
        for (kind, direction), codec in self.codecs.items():
            prefix = f"{kind}/{direction}/"
            of_role = {}
            for client, state in states.items():
                own = {name: value for name, value in state.items() if name.startswith(prefix)}
                if own:
                    of_role[client] = own
            codec.restore(of_role)


def codec_of(settings: WireSettings, seed: int) -> ByRole:
    """Returns a new codec by the settings of a run, for one side of the wire.

    Args:
        settings: Settings of the wire.
        seed: Seed of the run.
    """
    caches = sum("delta" in _names(text) for text in settings.codecs.values())
    # The budget is that of a client, and is divided among the codecs with a cache.
    share = settings.cache_bytes // max(1, caches)
    codecs = {role: make_codec(text, seed, share) for role, text in settings.codecs.items()}
    return ByRole(codecs)


def _names(text: str) -> list[str]:
    """Returns the names of the codecs in a chain."""
    return [link.name for link in parse_chain(text) or ()]
