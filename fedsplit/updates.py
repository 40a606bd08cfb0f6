"""What crosses a boundary between parties: packets at every step, adapters once a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class RefusedUpdate(Exception):
    """A client's answer that must not be aggregated; says whose it is and what is wrong with it."""


@dataclass(frozen=True)
class StepKey:
    """Names one step of one client, so that forward and backward find each other, and each counts once.

    Attributes:
        round: The round, from 1; 0 is the evaluation before the first.
        client: The client's partition, from 0.
        step: The step within the round, from 0.
        attempt: How often the client's round was begun before.
        micro: The micro-batch within the step, from 0.
        run: The run's name.
    """

    round: int
    client: int
    step: int
    attempt: int = 0
    micro: int = 0
    run: str = ""

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the step lies in its client's time: what is smaller came before."""
        return self.round, self.attempt, self.step

    def __str__(self) -> str:
        return f"round {self.round}, client {self.client}, step {self.step}.{self.micro}, attempt {self.attempt}"


@dataclass(frozen=True)
class Encoded:
    """A tensor as it lies on the wire.

    Attributes:
        data: The encoded values; their bytes are what is counted.
        dtype: The name of the type to decode into, such as "float32".
    """

    data: np.ndarray
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.data.nbytes


@dataclass(frozen=True)
class Packet:
    """One message between a client and the trunk.

    Attributes:
        key: The step it belongs to.
        tensors: "hidden" or "gradient" (B, T, D), and "mask" (B, T) where a batch is padded. Empty where
            an answer carries nothing, as when the client's bottom has nothing to learn, and where a client
            asks whether there is room for its hidden states.
        training: Whether this is a training step, with dropout, or evaluation.
        wants_gradient: Whether the client's bottom can use a gradient.
        micros: Micro-batches that the step consists of.
        incarnation: Which life of the trunk it is meant for; a trunk that was started again has another.
        shape: Of a question for room: that of the hidden states to come.
        wait: Of an answer: the trunk has no room for the step now; ask again after so many seconds.
    """

    key: StepKey
    tensors: Mapping[str, Encoded] = field(default_factory=dict)
    training: bool = True
    wants_gradient: bool = True
    micros: int = 1
    incarnation: str = ""
    shape: tuple[int, ...] = ()
    wait: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, read off the encoded data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Layer:
    """What a strategy must know of an adapted layer beside its factors.

    Attributes:
        scaling: The factor s in the layer's change s * B @ A (alpha / r, or alpha / sqrt(r) for rsLoRA).
        transposed: Whether the base stores its weight as (in, out), as GPT-2's Conv1D does; the change
            to add is then the transpose of s * B @ A.
    """

    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Adapters:
    """The adapters of one or more parts.

    Attributes:
        tensors: The factors by the names PEFT writes to a file, in the numbering of the unsplit model, e.g.
            `transformer.h.0.attn.c_attn.lora_A.weight` (r, in) and `….lora_B.weight` (out, r).
        layers: The adapted layers by module name, e.g. `transformer.h.0.attn.c_attn`.
    """

    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Layer]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """The pair A (r, in), B (out, r) of a layer."""
        return self.tensors[f"{layer}.lora_A.weight"], self.tensors[f"{layer}.lora_B.weight"]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapters:
        """The same layers with other factors."""
        return Adapters(tensors, self.layers)

    def __or__(self, other: Adapters) -> Adapters:
        """The adapters of the parts of both."""
        return Adapters({**self.tensors, **other.tensors}, {**self.layers, **other.layers})

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_fits(self, tensors: Mapping[str, Tensor], sender: str) -> None:
        """Makes sure that factors sent by somebody can take the place of these.

        Args:
            tensors: The factors that were sent.
            sender: Who sent them, for the message.

        Raises:
            RefusedUpdate: A name is missing or unknown, a shape differs, or a value is NaN or infinite.
        """
        if strange := sorted(tensors.keys() ^ self.tensors.keys()):
            raise RefusedUpdate(
                f"{sender} sent other layers than it was given: {strange[0]} and {len(strange) - 1} more"
            )
        for name, tensor in tensors.items():
            if tensor.shape != self.tensors[name].shape:
                expected, got = tuple(self.tensors[name].shape), tuple(tensor.shape)
                raise RefusedUpdate(f"{sender} sent {name} with shape {got} in place of {expected}")
            if not torch.isfinite(tensor).all():
                raise RefusedUpdate(f"{sender} sent NaN or infinite values in {name}")


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns at the end of its local training.

    Attributes:
        client: The client's partition, from 0.
        adapters: Its bottom's and top's adapters after training.
        examples: Training sequences it went through this round; the usual weight.
        tokens: Tokens among them.
        loss: Mean training loss, nats a token.
    """

    client: int
    adapters: Adapters
    examples: int
    tokens: int = 0
    loss: float = 0.0
