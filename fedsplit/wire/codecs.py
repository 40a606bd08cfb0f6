"""Codecs turn tensors into the bytes on the wire, and back: the interface, the memory and the making of codecs.

A new codec needs a file with a class, such as `fedsplit.wire.casting`, a line in `fedsplit.settings.choices.CODECS`,
and a line in the contract test `tests/wire/test_codec_contract.py`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from fedsplit.settings.chains import ChainLink, parse_chain
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import StepKey

State = TypeVar("State")

MOST_VALUES = 2**31
"""Largest number of values of any tensor on the wire."""

Stream = tuple[str, str, int, int, int]
"""Identifies a sequence of tensors, one for each step: kind, direction, client, batch and micro-batch."""


@dataclass(frozen=True)
class Role:
    """Place of a tensor in split learning.

    Attributes:
        kind: "activation" for hidden states, "gradient" for gradients by hidden states.
        direction: "up" from a client to the trunk, "down" from the trunk to a client.
        key: Step of the tensor.
        training: False for evaluation and for generated text.
        dtype: Type of the step's hidden states. A gradient may have a wider type: gradients by float16 hidden states
            are float32.
        examples: Number of each sequence within the client's data, in the order of the tensor's rows; empty if the
            numbers are not known.
        most: Largest possible number of values of the tensor. A decoder must not make a larger tensor.

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
    examples: tuple[int, ...] = ()
    most: int = MOST_VALUES

    @property
    def client(self) -> int:
        """Number of the client."""
        return self.key.client

    @property
    def stream(self) -> Stream:
        """Stream of the tensor: the tensors of all steps with equal kind, direction, client, batch and micro-batch."""
        return self.kind, self.direction, self.key.client, self.key.batch, self.key.micro


@dataclass(frozen=True)
class Place:
    """Place of a new codec in a chain, and the settings of the run that codecs use.

    Attributes:
        parameter: Number behind the colon of the codec's name; None for a codec without a parameter.
        rest: Codec of the values that the new codec leaves; None if the new codec is the last of the chain.
        remembers: True if the new codec may keep state from step to step.
        seed: Seed of the run.
        cache: Most bytes of the rows that a codec keeps for a client.
    """

    parameter: float | None = None
    rest: Codec | None = None
    remembers: bool = False
    seed: int = 0
    cache: int = 0


class Codec(ABC):
    """Encodes tensors into arrays for the wire, and decodes the arrays.

    Each side of a wire has a separate codec, so a codec may keep state; `CodecMemory` holds state by role. A step may
    be encoded or decoded more than once, for example after a lost answer. The result must be the same each time.

    Example:
        >>> import numpy as np
        >>> class Signs(Codec):  # one byte for each value
        ...     def encode(self, tensor, role):
        ...         return Encoded({"signs": np.sign(tensor.numpy()).astype(np.int8)}, {"dtype": "float32"})
        ...     def decode(self, encoded, role):
        ...         return torch.from_numpy(encoded.array("signs")).float()
        >>> role = Role("gradient", "up", StepKey(round=1, client=0, step=0))
        >>> Signs().decode(Signs().encode(torch.tensor([0.5, -2.0]), role), role)
        tensor([ 1., -1.])
    """

    needs_examples = False
    """True if the codec needs the numbers of the examples in a training step (`Role.examples`)."""

    @classmethod
    def at(cls, place: Place) -> Codec:
        """Returns a new codec for a place in a chain. A codec with parameters or state overrides the method."""
        return cls()

    @abstractmethod
    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor of any shape, without a copy if possible.

        A value that is NaN or infinite must reach the decoder as a value that is NaN or infinite, so that the trunk
        refuses the step.

        Args:
            tensor: Hidden states or a gradient.
            role: Place of the tensor.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a result of `encode` to a tensor of the original shape and type.

        The tensor may lie in read-only memory. Callers must not change the tensor in place.

        Args:
            encoded: Encoded tensor in correct form. The values come from the wire, and may be anything.
            role: Place of the tensor.

        Raises:
            MalformedPacket: No encoder makes arrays or a header like these.
        """

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the state of each client by name, or nothing for a codec without state.

        Names begin with kind and direction of the role, such as "gradient/up/residual": each role has a codec of its
        own, and the names tell whose state it is. Called between rounds. Each side keeps the state of clients with a
        round that counts: a client on the client's disk, the trunk in the run's checkpoint.
        """
        return {}

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:  # noqa: B027  # nothing without state
        """Replaces the state of all clients by an earlier result of `state`.

        Args:
            states: State by client, with tensors on the CPU. A missing client has no state.
        """


@dataclass(frozen=True)
class _Entry(Generic[State]):
    """State of one stream, before and after the newest step."""

    key: StepKey
    before: State | None
    after: State


class CodecMemory(Generic[State]):
    """State of a codec from step to step, such as the residual of error feedback.

    - Each stream (`Role.stream`) has a separate state.
    - A step that is encoded a second time finds the state of the first time.
    - Every attempt at a round begins with the state at the end of the client's last round that counted: both sides call
      `restore` between rounds, with an earlier result of `states`. So a repeated or resumed round gives equal bits.
    - Evaluations neither find nor leave any state.

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
        if entry is None:
            return self._start.get(role.stream)
        if entry.key == role.key:  # the step is encoded again
            return entry.before
        same_round = entry.key.round == role.key.round
        same_attempt = same_round and entry.key.attempt == role.key.attempt
        return entry.after if same_attempt else self._start.get(role.stream)

    def set_after(self, role: Role, state: State) -> None:
        """Sets the state after a step."""
        if role.training:
            # `before` is asked first: a step that is encoded again keeps the state from before its first time.
            self._entries[role.stream] = _Entry(role.key, self.before(role), state)

    def states(self) -> dict[int, dict[str, State]]:
        """Returns the newest state of all streams, by client and the rest of the stream, such as "gradient/up/0/0"."""
        newest = dict(self._start)
        for stream, entry in self._entries.items():
            newest[stream] = entry.after
        by_client: dict[int, dict[str, State]] = {}
        for (kind, direction, client, batch, micro), state in newest.items():
            by_client.setdefault(client, {})[f"{kind}/{direction}/{batch}/{micro}"] = state
        return by_client

    def restore(self, states: Mapping[int, Mapping[str, State]]) -> None:
        """Replaces all state by an earlier result of `states`."""
        self._entries = {}
        self._start = {}
        for client, by_stream in states.items():
            for name, state in by_stream.items():
                kind, direction, batch, micro = name.split("/")
                self._start[kind, direction, client, int(batch), int(micro)] = state


def copy_of_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of a client's state on the CPU, for a file."""
    copied = {}
    for name, tensor in state.items():
        copied[name] = tensor.detach().to("cpu", copy=True).contiguous()  # safetensors writes contiguous tensors only
    return copied


def make_codec(text: str, seed: int = 0, cache: int = 0) -> Codec:
    """Returns a new codec, for one side of a wire.

    Args:
        text: Name of a codec in `fedsplit.settings.choices.CODECS`, or a chain such as "topk:0.1,int8,zstd".
        seed: Seed of the run.
        cache: Most bytes of the rows that the codec keeps for a client.

    Raises:
        ValueError: The text is no chain of codecs.

    Example:
        >>> codec = make_codec("bf16")
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> encoded = codec.encode(torch.ones(2, 3), role)
        >>> encoded.nbytes
        12
        >>> codec.decode(encoded, role).dtype
        torch.float32
    """
    links = parse_chain(text)
    if links is None:
        raise ValueError(f"{text} is no chain of codecs")
    # From the last to the first, since each codec hands values to the next. A codec of bytes wraps all others.
    codec: Codec | None = None
    for link in reversed(links):
        if link.entry.place != "bytes":
            codec = _class_of(link).at(Place(link.parameter, codec, link.remembers, seed, cache))
    last = links[-1]
    if last.entry.place == "bytes":
        codec = _class_of(last).at(Place(last.parameter, codec))
    assert codec is not None
    return codec


def _class_of(link: ChainLink) -> type[Codec]:
    # By name: the settings list all codecs, and must not import them.
    module, _, kind = link.entry.path.partition(":")
    found: type[Codec] = getattr(importlib.import_module(module), kind)
    return found
