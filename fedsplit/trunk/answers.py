"""Answers of the trunk: tensors for clients, and counts of the bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.trunk.status import Bytes, Traffic
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import Codec, Role
from fedsplit.wire.example_numbers import examples_of
from fedsplit.wire.packets import RANDOM, Packet, StepKey


class Answers:
    """Encodes the trunk's results as packets, and counts the bytes of every request and its answer.

    Attributes:
        codec: Codec of hidden states and gradients, at the trunk's side.
        traffic: Bytes so far.
    """

    def __init__(self, codec: Codec, traffic: Traffic) -> None:
        """Starts with given counts.

        Args:
            codec: Codec of hidden states and gradients.
            traffic: Counts to add to.
        """
        self.codec = codec
        self.traffic = traffic

    def with_hidden(
        self,
        crossed: Bytes,
        packets: Sequence[Packet],
        hidden: Mapping[StepKey, Tensor],
        sums: Mapping[StepKey, RouterSums],
        random: Tensor | None = None,
    ) -> list[Packet]:
        """Returns answers with hidden states.

        Args:
            crossed: Counts that the bytes of requests and answers are added to.
            packets: The requests.
            hidden: Hidden states (B, T, D) by step.
            sums: Router sums by step, of the steps with an auxiliary loss.
            random: State of the random generator, for the next stage of the trunk; None if clients get the answers.
        """
        answers = []
        for packet in packets:
            tensor = hidden[packet.key]
            # The type of the values that cross, which is wider than the part's where float32 adapters lie in their
            # path.
            role = Role("activation", "down", packet.key, packet.training, tensor.dtype, examples_of(packet))
            tensors = {"hidden": self.codec.encode(tensor, role)}
            if packet.key in sums:  # exactly: the top's loss must equal the library's to the bit
                tensors[SUMS] = EXACT.encode(sums[packet.key].packed())
            if random is not None:
                tensors[RANDOM] = EXACT.encode(random)
            answer = Packet(packet.key, tensors, packet.training)
            self.count(crossed, packet, answer)
            answers.append(answer)
        return answers

    def with_gradients(
        self, packets: Sequence[Packet], gradients: Mapping[StepKey, Tensor], inputs: Mapping[StepKey, Tensor]
    ) -> list[Packet]:
        """Returns answers with gradients. The answer to a client that cannot use a gradient has no tensors.

        Args:
            packets: The requests.
            gradients: Gradients (B, T, D) of the inputs by step.
            inputs: The inputs (B, T, D) by step. A gradient crosses in the type of the input.
        """
        answers = []
        for packet in packets:
            tensors = {}
            if packet.key in gradients:
                dtype = inputs[packet.key].dtype
                role = Role("gradient", "down", packet.key, packet.training, dtype, examples_of(packet))
                tensors["gradient"] = self.codec.encode(gradients[packet.key], role)
            answer = Packet(packet.key, tensors, packet.training)
            self.count(self.traffic.gradient, packet, answer)
            answers.append(answer)
        return answers

    def count(self, crossed: Bytes, up: Packet, down: Packet) -> None:
        """Adds the bytes of a request and of the answer to some counts."""
        crossed.add(up.key.client, up.nbytes, down.nbytes)
