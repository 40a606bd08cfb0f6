"""What crosses between a client and the trunk at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class StepKey:
    """Names one step of one client, so that forward and backward find each other, and each counts once.

    Attributes:
        round: The round, from 1; 0 is the evaluation before the first.
        client: The client's partition, from 0.
        step: The step within the round, from 0.
        attempt: How often the client's round was begun before.
        micro: The micro-batch within the batch, from 0.
        run: The run's name.
        batch: The batch within the step, from 0; above 0 only where gradients are accumulated.
        session: Where text is generated, which one: `step` counts what was sent of it, from 0, the prompt. Empty
            elsewhere.
    """

    round: int
    client: int
    step: int
    attempt: int = 0
    micro: int = 0
    run: str = ""
    batch: int = 0
    session: str = ""

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the batch lies in its client's time: what is smaller came before."""
        return self.round, self.attempt, self.step, self.batch

    @property
    def turn(self) -> tuple[int, int, int]:
        """Which step of the optimiser it belongs to."""
        return self.round, self.attempt, self.step

    def __str__(self) -> str:
        if self.session:
            return f"session {self.session}, client {self.client}, step {self.step}"
        batch = f", batch {self.batch}" if self.batch else ""
        return f"round {self.round}, client {self.client}, step {self.step}.{self.micro}{batch}, attempt {self.attempt}"


@dataclass(frozen=True)
class Encoded:
    """A tensor as it lies on the wire.

    Attributes:
        data: The encoded values; their bytes are what is counted.
        dtype: The name of the type to decode into, such as "float32".
        scale: What the values were multiplied by to fit into a narrow type; a power of two.
    """

    data: np.ndarray
    dtype: str
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.data.nbytes


@dataclass(frozen=True)
class Packet:
    """One message between a client and the trunk.

    Attributes:
        key: The step it belongs to.
        tensors: "hidden" or "gradient" (B, T, D), "mask" (B, T) where a batch is padded, and "routers" where there is
            an auxiliary loss (`fedsplit.model.routers`): the sums (2E + 1,), or the gradient (E,) by them. Empty where
            an answer carries nothing, as when the client's bottom has nothing to learn, and where a client
            asks whether there is room for its hidden states. With clipping, "norm" () in the answer to the last
            gradient of a step, the squared norm of the adapter's gradient; and "coefficient" (), which the client
            sends then, and which the gradient is scaled by.
        training: Whether this is a training step, with dropout, or evaluation.
        wants_gradient: Whether the client's bottom can use a gradient.
        micros: Micro-batches that the batch consists of.
        batches: Batches that the step consists of.
        rate: The share of the learning rate at which the step is made.
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
    batches: int = 1
    rate: float = 1.0

    @property
    def parts(self) -> int:
        """In how many parts the gradients of a step come."""
        return self.micros * self.batches

    @property
    def ends(self) -> bool:
        """Whether it is of the last part of its step."""
        return (self.key.batch, self.key.micro) == (self.batches - 1, self.micros - 1)

    @property
    def clipping_key(self) -> StepKey:
        """Under which key its step's coefficient comes: that of one micro-batch more than the last batch has."""
        return replace(self.key, batch=self.batches - 1, micro=self.micros)

    @property
    def clips(self) -> bool:
        """Whether it tells what a step's gradient is to be scaled by."""
        return "coefficient" in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, read off the encoded data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
