"""Decodes and checks the tensors from clients. A tensor that the trunk cannot use is refused, with the step's name.

A client may be a stranger, so every shape, type and value is checked before a block computes.

Shapes: B sequences of T tokens a step, D the width of hidden states, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedsplit.model.devices import random_state
from fedsplit.model.facts import positions_of
from fedsplit.model.parts import Trunk
from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.optimization.bounds import is_bounded
from fedsplit.settings.sections import TrainSettings
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import MOST_VALUES, Codec, Role
from fedsplit.wire.encoded import MalformedPacket
from fedsplit.wire.example_numbers import examples_of
from fedsplit.wire.packets import EXAMPLES, RANDOM, Packet, StepKey
from fedsplit.wire.steps import RefusedStep, SpoiledStep, SpoiledTogether, UnboundedStep

T = TypeVar("T")


class Intake:
    """Decodes the tensors of packets and checks type, shape and values.

    Attributes:
        has_predecessor: True if the packets come from another stage of the trunk, not from clients.
    """

    def __init__(
        self,
        part: Trunk,
        codec: Codec,
        device: torch.device,
        has_predecessor: bool = False,
    ) -> None:
        """Prepares for a part.

        Args:
            part: Blocks of the trunk. Width, type and number of experts follow from the blocks.
            codec: Codec of hidden states and gradients.
            device: Device for the decoded tensors.
            has_predecessor: True if the packets come from another stage of the trunk.
        """
        self.has_predecessor = has_predecessor
        self._part = part
        self._codec = codec
        self._device = device

    def check_tensors(self, packet: Packet, *names: str) -> None:
        """Checks that a packet has no further tensors.

        Args:
            packet: The packet.
            *names: Names of the tensors that the packet may have.

        Raises:
            SpoiledStep: The packet has a further tensor, or router sums for a part without experts.
        """
        # Any training step may have numbers of examples, since the codecs of other stages may need them.
        if more := sorted(packet.tensors.keys() - {*names, EXAMPLES}):
            raise SpoiledStep(f"{packet.key} sent its {more[0]} where nobody asked for it")
        if SUMS in packet.tensors and not self._part.experts:
            raise SpoiledStep(f"{packet.key} sent something of routers, which the model does not have")

    def check_shape(self, key: StepKey, shape: Sequence[int], rows: int | None = None) -> None:
        """Checks that the blocks can compute with hidden states of a shape.

        Args:
            key: The step.
            shape: The shape.
            rows: Most sequences; None for any number.

        Raises:
            SpoiledStep: The shape is not (B, T, D), or too large.
        """
        width = self._part.config.hidden_size
        longest = positions_of(self._part.config)
        is_empty = not math.prod(shape)
        if len(shape) != 3 or shape[2] != width or is_empty:
            raise SpoiledStep(f"{key} sent hidden states of shape {tuple(shape)}, not (B, T, {width})")
        sequences, positions, _ = shape
        if positions > longest:
            raise SpoiledStep(f"{key} sent {positions} positions, beyond the model's {longest}")
        if rows is not None and sequences > rows:
            raise SpoiledStep(f"{key} sent {sequences} sequences, more than the {rows} of a batch")

    def hidden(self, packet: Packet, rows: int | None = None) -> Tensor:
        """Returns the hidden states (B, T, D) of a packet, in the part's type or in float32.

        float32 occurs where float32 adapters lie in the path of the hidden states, as in the norms of a mixture of
        experts. The unsplit model of this kind carries float32 from block to block, too.

        Args:
            packet: The packet.
            rows: Most sequences; None for any number.

        Raises:
            SpoiledStep: The hidden states are missing, or have a wrong shape or type.
            UnboundedStep: A value is not finite, or too large.
        """
        kind = self._part.dtype
        most = self._most_values(rows)
        examples = self.examples(packet)
        role = Role("activation", "up", packet.key, packet.training, kind, examples, most)
        hidden = self._decoded(packet, "hidden", self._codec, role)
        self.check_shape(packet.key, hidden.shape, rows)
        self.examples(packet, len(hidden))
        if hidden.dtype not in (kind, torch.float32):
            raise SpoiledStep(f"{packet.key} sent hidden states of type {hidden.dtype}, not {kind}")
        if not is_bounded(hidden):
            raise UnboundedStep(f"{packet.key} sent hidden states that are NaN, infinite or too large to compute with")
        return hidden

    def _most_values(self, rows: int | None) -> int:
        """Returns the largest possible number of values of a packet's hidden states."""
        if rows is None:
            return MOST_VALUES
        return rows * positions_of(self._part.config) * self._part.config.hidden_size

    def examples(self, packet: Packet, sequences: int | None = None) -> tuple[int, ...]:
        """Returns the numbers of the examples of a packet; empty for a packet without them.

        Args:
            packet: The packet.
            sequences: Number of sequences in the packet; None if the number is not known yet.

        Raises:
            SpoiledStep: The numbers have a wrong form.
        """
        try:
            examples = examples_of(packet)
        except MalformedPacket as error:
            raise SpoiledStep(f"{packet.key} sent its {EXAMPLES} in a wrong form: {error}") from None
        if examples and sequences is not None and len(examples) != sequences:
            raise SpoiledStep(f"{packet.key} sent {len(examples)} {EXAMPLES} with {sequences} sequences")
        return examples

    def mask(self, packet: Packet, hidden: Tensor) -> Tensor:
        """Returns the mask (B, T) of a packet with padding.

        Raises:
            SpoiledStep: The mask does not fit the hidden states.
        """
        mask = self._exact(packet, "mask")
        if mask.shape != hidden.shape[:2]:
            expected = tuple(hidden.shape[:2])
            raise SpoiledStep(f"{packet.key} sent a mask of shape {tuple(mask.shape)}, not {expected}")
        if mask.dtype != torch.bool:
            raise SpoiledStep(f"{packet.key} sent a mask of type {mask.dtype}, not true and false")
        return mask

    def sums(self, packet: Packet) -> RouterSums:
        """Returns the router sums (2E + 1,) of a packet with an auxiliary loss.

        Raises:
            SpoiledStep: The number of sums does not fit the number of experts.
            UnboundedStep: A sum is not finite, or too large.
        """
        sums = self._exact(packet, SUMS)
        size = 2 * self._part.experts + 1
        fits = sums.shape == (size,) and sums.is_floating_point()
        if not fits or not is_bounded(sums):
            # An honest client whose training diverged sends NaN. Only a broken or dishonest client sends a wrong shape.
            kind = UnboundedStep if fits else SpoiledStep
            raise kind(f"{packet.key} sent {tuple(sums.shape)} as sums of routers, not {size} finite numbers")
        return RouterSums.unpacked(sums)

    def random(self, packet: Packet) -> Tensor:
        """Returns the state of the random generator after the stage below, as bytes.

        Raises:
            SpoiledStep: The bytes are no state of this machine's generator.
        """
        state = EXACT.decode(packet.tensors[RANDOM])
        # torch's generators differ in the length of their states, such as on a CPU and on a GPU.
        expected = random_state(self._device)
        if state.dtype != torch.uint8 or state.shape != expected.shape:
            raise SpoiledStep(f"{packet.key} sent a state of a random generator of another kind than this one's")
        return state

    def gradient(self, packet: Packet, hidden: Tensor) -> Tensor:
        """Returns the gradient (B, T, D) of a packet, in the part's type or in float32.

        Args:
            packet: The packet.
            hidden: Hidden states of the same step.

        Raises:
            SpoiledStep: The gradient is missing, its shape differs from the hidden states' shape, or its type is wrong.
            UnboundedStep: A value is not finite, or too large.
        """
        examples = self.examples(packet, len(hidden))
        most = hidden.numel()
        role = Role("gradient", "up", packet.key, packet.training, hidden.dtype, examples, most)
        gradient = self._decoded(packet, "gradient", self._codec, role)
        if gradient.shape != hidden.shape:
            sent = tuple(gradient.shape)
            raise SpoiledStep(f"{packet.key} sent a gradient of shape {sent}, not {tuple(hidden.shape)}")
        # The codec decodes gradients by float16 hidden states to float32, since in float16 small values become zero.
        kind = torch.float32 if self._part.dtype == torch.float16 else self._part.dtype
        if gradient.dtype not in (kind, torch.float32):
            raise SpoiledStep(f"{packet.key} sent a gradient of type {gradient.dtype}, not {kind}")
        if not is_bounded(gradient):
            raise UnboundedStep(f"{packet.key} sent NaN, infinite or too large values as its gradient")
        return gradient

    def gradient_by_sums(self, packet: Packet, has_sums: bool) -> Tensor:
        """Returns the gradient (E,) by the router sums of a step with an auxiliary loss.

        Args:
            packet: The packet.
            has_sums: True if the forward of the step had router sums.

        Raises:
            SpoiledStep: The step has no router sums, or the gradient has a wrong size.
            UnboundedStep: A value is not finite, or too large.
        """
        gradient = self._exact(packet, SUMS)
        size = self._part.experts
        fits = has_sums and gradient.shape == (size,) and gradient.is_floating_point()
        if not fits or not is_bounded(gradient):
            kind = UnboundedStep if fits else SpoiledStep
            raise kind(f"{packet.key} sent a gradient by sums of routers that is not {size} finite numbers")
        return gradient

    def coefficient(self, packet: Packet, most: float) -> float:
        """Returns the clipping coefficient of a packet.

        Args:
            packet: The packet.
            most: Largest possible coefficient, by the norm of the trunk's gradient.

        Raises:
            SpoiledStep: The coefficient is no number from 0 to `most`.
            UnboundedStep: The coefficient is not finite.
        """
        value = self._exact(packet, "coefficient")
        is_number = value.ndim == 0 and value.is_floating_point()
        if not is_number or not 0 <= float(value) <= most:  # NaN fails the comparison, too
            kind = SpoiledStep if value.ndim or torch.isfinite(value) else UnboundedStep
            # A stranger may send a tensor of any size. Three values are enough for a message.
            sent = value.flatten()[:3].tolist()
            words = f"a number from 0 to {most:.6g}, which the trunk's own gradient allows"
            raise kind(f"{packet.key} sent {sent} to scale its gradient by, not {words}")
        return float(value)

    def _exact(self, packet: Packet, name: str) -> Tensor:
        """Returns a tensor that crosses without loss, whatever the codec of hidden states and gradients."""
        return self._decoded(packet, name, EXACT, Role("activation", "up", packet.key))

    def _decoded(self, packet: Packet, name: str, codec: Codec, role: Role) -> Tensor:
        if name not in packet.tensors:
            raise SpoiledStep(f"{packet.key} sent no {name}")
        try:
            # `each` sorts out refusals by step. Any other error would fail the whole batch.
            return codec.decode(packet.tensors[name], role).to(self._device)
        except MalformedPacket as error:
            raise SpoiledStep(f"{packet.key} sent its {name} in a wrong form: {error}") from None


def check_rate(packet: Packet) -> None:
    """Checks that a client asks for a share of the learning rate from 0 to 1.

    Raises:
        SpoiledStep: The share lies outside 0 to 1.
    """
    if not 0 <= packet.rate <= 1:
        raise SpoiledStep(f"{packet.key} asks for {packet.rate} of the learning rate, not a share from 0 to 1")


def check_parts(packet: Packet, settings: TrainSettings) -> None:
    """Checks that the settings allow the batch and micro-batch numbers of a packet.

    A step with a number that no honest client sends would be pending until the lease runs out.

    Raises:
        SpoiledStep: A number is not allowed.
    """
    key = packet.key
    # 0 micro-batches: the number is planned later, and at most the number of sequences in a batch.
    most = settings.micro_batches or settings.batch_size
    micro_is_allowed = key.micro < packet.micros <= most
    batch_is_allowed = key.batch < packet.batches <= settings.accumulation
    if not (micro_is_allowed and batch_is_allowed):
        sent = f"micro-batch {key.micro} of {packet.micros} in batch {key.batch} of {packet.batches}"
        limits = f"--micro-batches allows {most} at most, --train.accumulation {settings.accumulation}"
        raise SpoiledStep(f"{key} says that it is {sent}, counted from 0; {limits}")


def each(packets: Sequence[Packet], read: Callable[[Packet], T]) -> dict[StepKey, T]:
    """Reads all packets. Refusals are raised after the last packet, so that the caller learns of every bad packet.

    Args:
        packets: Packets of one or more steps that are computed together.
        read: Reads a packet, or raises a `RefusedStep`.

    Returns:
        Results of `read` by step.

    Raises:
        RefusedStep: The only packet must not be served.
        SpoiledTogether: Some of several packets must not be served.
    """
    results: dict[StepKey, T] = {}
    refused: dict[StepKey, RefusedStep] = {}
    for packet in packets:
        try:
            results[packet.key] = read(packet)
        except RefusedStep as reason:
            refused[packet.key] = reason
    if refused:
        raise refusal(refused, len(packets))
    return results


def refusal(refused: Mapping[StepKey, RefusedStep], together: int) -> Exception:
    """Returns the exception to raise where some steps are refused.

    Args:
        refused: Reasons by step.
        together: Number of steps that are served together, including refused steps.

    Returns:
        The reason itself for a single step, else a `SpoiledTogether`.

    Example:
        >>> late = RefusedStep("too late")
        >>> refusal({StepKey(0, 1, 0): late}, together=1)
        RefusedStep('too late')
        >>> type(refusal({StepKey(0, 1, 0): late}, together=2)).__name__
        'SpoiledTogether'
    """
    return next(iter(refused.values())) if together == 1 else SpoiledTogether(refused)
