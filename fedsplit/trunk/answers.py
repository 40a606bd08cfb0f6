"""Answers of the trunk: tensors for clients, and counts of the bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.network.trace import Crossing, Kind, Trace
from fedsplit.trunk.status import Bytes, Traffic
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import Codec, Role
from fedsplit.wire.example_numbers import examples_of
from fedsplit.wire.frames import framing
from fedsplit.wire.packets import RANDOM, Packet, StepKey


class Answers:
    """Encodes the trunk's results as packets, and counts the bytes of every request and its answer.

    Attributes:
        codec: Codec of hidden states and gradients, at the trunk's side.
        traffic: Bytes so far.
        trace: Trace of all requests and answers, for a virtual clock; None without one.
    """

    def __init__(self, codec: Codec, traffic: Traffic) -> None:
        """Starts with given counts.

        Args:
            codec: Codec of hidden states and gradients.
            traffic: Counts to add to.
        """
        self.codec = codec
        self.traffic = traffic
        self.trace: Trace | None = None

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
            is_new = crossed is not self.traffic.repeated and not packet.key.session
            if is_new:
                kind: Kind = "forward" if packet.training else "evaluation"
                self.record("reference" if not packet.is_adapted else kind, packet, answer, tensor)
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
            self.record("backward", packet, answer, inputs[packet.key])
            answers.append(answer)
        return answers

    def with_norm(self, answer: Packet, norm: Tensor) -> Packet:
        """Returns the answer to the last gradient of a step, with the squared norm () of the trunk's gradient."""
        encoded = EXACT.encode(norm)
        with_norm = replace(answer, tensors={**answer.tensors, "norm": encoded})
        # The answer without the norm has been counted.
        self.traffic.gradient.add(answer.key.client, up=0, down=encoded.nbytes)
        more_framing = framing(with_norm) - framing(answer)
        self.traffic.gradient.framing.add(answer.key.client, up=0, down=more_framing)
        if self.trace is not None:
            self.trace.add_to_last(down=encoded.nbytes)
        return with_norm

    def count(self, crossed: Bytes, up: Packet, down: Packet) -> None:
        """Adds a request and the answer to some counts."""
        crossed.add(up.key.client, up.nbytes, down.nbytes)
        crossed.framing.add(up.key.client, framing(up), framing(down))
        crossed.packets.add(up.key.client, up=1, down=1)

    def record(
        self,
        kind: Kind,
        up: Packet,
        down: Packet,
        values: Tensor | None = None,
    ) -> None:
        """Adds a request and its answer to the trace, if there is one.

        Args:
            kind: Purpose of the request.
            up: The request.
            down: The answer.
            values: Hidden states or gradients (B, T, D) that crossed; None for a clipping coefficient.
        """
        if self.trace is None:
            return
        key = up.key
        rows = 0 if values is None else values.shape[0]
        length = 0 if values is None else values.shape[1]
        self.trace.add(
            Crossing(
                round=key.round,
                client=key.client,
                attempt=key.attempt,
                step=key.step,
                batch=key.batch,
                micro=key.micro,
                kind=kind,
                up=up.nbytes,
                down=down.nbytes,
                rows=rows,
                length=length,
                learns=up.learns,
                ends=up.ends,
                returns_gradient="gradient" in down.tensors,
            )
        )
