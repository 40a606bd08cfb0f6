"""Codecs turn tensors into the bytes that cross, and back: their interface, their memory, and how one is made.

A codec is a class in a file of its own, such as `fedsplit.wire.casting`, and a line in
`fedsplit.settings.choices.CODECS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from fedsplit.settings.choices import CODECS
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import StepKey

State = TypeVar("State")

Stream = tuple[str, str, int, int, int]
"""Identifies tensors that follow each other step by step: kind, direction, client, batch and micro-batch."""


@dataclass(frozen=True)
class Role:
    """Place of a tensor in split learning.

    Attributes:
        kind: "activation" for hidden states, "gradient" for the gradient by them.
        direction: "up" from a client to the trunk, "down" from the trunk to a client.
        key: Step that the tensor belongs to.
        training: False for evaluation and for generated text.
        dtype: Type of the step's hidden states. A gradient may have a wider one: those by float16 hidden states are
            float32.

    Example:
        >>> role = Role("gradient", "up", StepKey(round=1, client=3, step=0))
        >>> role.client
        3
    """

    kind: Literal["activation", "gradient"]
    direction: Literal["up", "down"]
    key: StepKey
    training: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def client(self) -> int:
        """Number of the client."""
        return self.key.client

    @property
    def stream(self) -> Stream:
        """Identifies the tensors of the same kind, direction, client, batch and micro-batch of all steps."""
        return self.kind, self.direction, self.key.client, self.key.batch, self.key.micro


class Codec(ABC):
    """Encodes tensors into arrays whose bytes cross, and decodes them.

    Each side of a wire has a codec of its own, so that a codec may keep state: `CodecMemory` holds it by role. A step
    may be encoded or decoded more than once, as when an answer is lost; the result must then be the same.
    """

    @abstractmethod
    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor of any shape; copies it only where it must.

        Args:
            tensor: Hidden states or a gradient.
            role: Place of the tensor.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes what the other side's `encode` returned, to a tensor of the same shape and type.

        The tensor may lie in memory that must not be written to: use it, do not change it.

        Args:
            encoded: Encoded tensor in correct form, which came from elsewhere and may say anything.
            role: Place of the tensor.

        Raises:
            MalformedPacket: No encoder makes such arrays or such a header.
        """

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the state of each client, by any names; nothing for a codec without state.

        Called between rounds. Each side keeps the state of a client whose round counts: a client on its disk, the trunk
        in the run's checkpoint.
        """
        return {}

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:  # noqa: B027  # nothing without state
        """Replaces the state of all clients by what `state` returned after an earlier round.

        Args:
            states: State by client, with tensors on the CPU. Clients that are missing have none.
        """


@dataclass(frozen=True)
class _Entry(Generic[State]):
    """State of one stream, before and after its newest step."""

    key: StepKey
    before: State | None
    after: State


class CodecMemory(Generic[State]):
    """State that a codec keeps from step to step, such as the residual of error feedback.

    - Each stream has its own: `Role.stream`.
    - A step that is encoded again finds the state as it was at the first time.
    - Every attempt at a round begins with the state at the end of the client's last round that counted: both sides call
      `restore` between rounds, with what `states` returned then. So a repeated or resumed round gives the same.
    - Evaluations neither find nor leave any.

    Example:
        >>> memory = CodecMemory[float]()
        >>> first, second = (Role("activation", "up", StepKey(1, 0, step)) for step in (0, 1))
        >>> memory.set_after(first, 0.5)
        >>> memory.before(second)
        0.5
        >>> memory.set_after(second, 0.7)
        >>> memory.before(second)  # the same step again
        0.5
    """

    def __init__(self) -> None:
        """Starts without state."""
        self._start: dict[Stream, State] = {}
        self._entries: dict[Stream, _Entry[State]] = {}  # of this round

    def before(self, role: Role) -> State | None:
        """Returns the state before a step; None at a client's first step, and in evaluations."""
        if not role.training:
            return None
        entry = self._entries.get(role.stream)
        if entry is not None and entry.key == role.key:
            return entry.before
        if entry is not None and (entry.key.round, entry.key.attempt) == (role.key.round, role.key.attempt):
            return entry.after
        return self._start.get(role.stream)

    def set_after(self, role: Role, state: State) -> None:
        """Sets the state after a step."""
        if role.training:
            self._entries[role.stream] = _Entry(role.key, self.before(role), state)

    def states(self) -> dict[int, dict[str, State]]:
        """Returns the newest state of all streams, by client and the rest of the stream, such as "gradient/up/0/0"."""
        newest = {**self._start, **{stream: entry.after for stream, entry in self._entries.items()}}
        found: dict[int, dict[str, State]] = {}
        for (kind, direction, client, batch, micro), state in newest.items():
            found.setdefault(client, {})[f"{kind}/{direction}/{batch}/{micro}"] = state
        return found

    def restore(self, states: Mapping[int, Mapping[str, State]]) -> None:
        """Replaces all state by what `states` returned earlier."""
        self._entries = {}
        self._start = {}
        for client, by_stream in states.items():
            for name, state in by_stream.items():
                kind, direction, batch, micro = name.split("/")
                self._start[kind, direction, client, int(batch), int(micro)] = state


def copy_of_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of a client's state, on the CPU, which can be written to a file."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def make_codec(name: str) -> Codec:
    """Returns a new codec, for one side of a wire.

    Args:
        name: One of `fedsplit.settings.choices.CODECS`.

    Example:
        >>> codec = make_codec("bf16")
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> encoded = codec.encode(torch.ones(2, 3), role)
        >>> encoded.nbytes
        12
        >>> codec.decode(encoded, role).dtype
        torch.float32
    """
    module, _, kind = CODECS[name].partition(":")
    codec: Codec = getattr(importlib.import_module(module), kind)()
    return codec
