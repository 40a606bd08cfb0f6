"""Memory of client and trunk: weights, adapters, optimiser moments, pending activations, and the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsplit.adaptation import lora
from fedsplit.estimation.party_shapes import Parties
from fedsplit.model.block_layers import is_uncalled
from fedsplit.model.devices import TYPES
from fedsplit.model.parts import Kind, Part

CLIENT_LIBRARIES = 488_000_000
"""Resident memory of a client's process with torch, transformers, PEFT, Flower and Ray, and a model without weights.

This constant and the next two are from measurements on Linux; `experiments/estimate` has them.
"""

TRUNK_LIBRARIES = 468_000_000
"""Resident memory of the trunk's process with its libraries, and a model without weights."""

ALLOCATOR = 1.2
"""Resident memory of a step as a multiple of the memory of its tensors: glibc keeps pages of tensors that are freed.

In measurements the factor was 1.1 to 1.6, and nearer to 1 for large steps, whose tensors glibc gives back.
"""

_COPIES = 3
"""Tensors as large as the adapters beside parameters, gradients and moments: those of the start, of the round's
beginning, and of the answer at a client; of pending snapshots at the trunk."""

_HEAD_WEIGHTS = ("lm_head.weight", "lm_head.base_layer.weight")
"""Names of a head's base weight, which is the embedding's in a tied model."""

_BLOCK_OF_4_BIT = 64
"""Values that share one scale in 4 bits."""


@dataclass(frozen=True)
class PartyMemory:
    """Parameters and memory of one party.

    Attributes:
        parameters: Number of parameters, base and adapters.
        trainable: Number of parameters that train.
        weights: Bytes of the base weights.
        adapters: Bytes of the adapters.
        moments: Bytes of the optimiser's state.
        gradients: Bytes of the adapters' gradients.
        activations: Bytes of the activations of one pending batch, between forward and backward.
        working: Further bytes at the peak of a step, beyond what is pending.
        libraries: Bytes of a process without a model, a stated constant.
        pending: Number of batches that are pending at the same time at the peak.
    """

    parameters: int
    trainable: int
    weights: int
    adapters: int
    moments: int
    gradients: int
    activations: int
    working: int
    libraries: int
    pending: int = 1

    @property
    def model(self) -> int:
        """Bytes of weights, adapters, gradients and moments, with the copies of adapters that a round makes."""
        return self.weights + (1 + _COPIES) * self.adapters + self.gradients + self.moments

    @property
    def peak(self) -> int:
        """Largest resident memory of the party's process, in bytes."""
        return self.libraries + self.model + round(ALLOCATOR * (self.pending * self.activations + self.working))


def client_memory(parties: Parties) -> PartyMemory:
    """Returns the memory of a client: bottom and top.

    Example:
        >>> from fedsplit.settings.config import Config
        >>> memory = client_memory(Parties(Config()))
        >>> memory.parameters, memory.trainable
        (593408, 32768)
    """
    rows, micros = parties.rows_of_micro_batch, parties.micro_batches
    bottom = parties.trace("bottom", rows)
    top = parties.trace("top", rows)
    hidden = rows * parties.positions * parties.facts.width * bottom.dtype.itemsize
    activations = micros * (bottom.kept if bottom.needs_gradient else hidden)
    # The top computes while all micro-batches of the bottom are pending, and the packets of one are in memory.
    while_top = activations + top.peak + 2 * hidden
    while_bottom = activations + bottom.backward - bottom.kept + hidden if bottom.needs_gradient else bottom.forward
    peak = max(while_top, while_bottom, _evaluation(parties))
    return _party(parties, ["bottom", "top"], activations, peak - activations, CLIENT_LIBRARIES, 1)


def trunk_memory(parties: Parties, pending: int = 1) -> PartyMemory:
    """Returns the memory of the trunk, over all its stages.

    Args:
        parties: The parties of the run.
        pending: Number of clients whose batches are pending at the same time.
    """
    rows, micros = parties.rows_of_micro_batch, parties.micro_batches
    together = pending if parties.schedule.gathers else 1  # steps that are computed as one
    activations = working = 0.0
    for number in range(len(parties.stages)):
        step = parties.trace("trunk", rows * together, number)
        hidden = rows * parties.positions * parties.facts.width * step.dtype.itemsize
        kept = step.kept + hidden if step.needs_gradient else hidden  # the input stays for the backward
        # A trace of gathered steps has the activations of all clients, and `peak` multiplies by the pending batches.
        activations += micros * kept / together
        working = max(working, step.peak - step.kept + 2 * hidden)
    return _party(parties, ["trunk"], activations, working, TRUNK_LIBRARIES, pending)


def _evaluation(parties: Parties) -> float:
    """Returns the bytes of the logits of an evaluation with metrics, or of pairs; 0 where none are made."""
    config = parties.config
    if not config.metric and not parties.demands.compares:
        return 0.0
    rows = min(config.eval.samples, config.train.batch_size)
    vocabulary = parties.top.config.vocab_size
    # Logits in the type of computation, and in float32 for the metric.
    width = TYPES[config.dtype].itemsize + 4
    return float(rows * parties.positions * vocabulary * width)


@dataclass(frozen=True)
class Counts:
    """Parameters of a party.

    Attributes:
        parameters: Number of parameters, base and adapters. A tied head counts once.
        trainable: Number of parameters that train.
        weights: Bytes of the base weights.
        adapters: Bytes of the adapters.
    """

    parameters: int
    trainable: int
    weights: int
    adapters: int


def counts_of(parties: Parties, kinds: Sequence[Kind]) -> Counts:
    """Counts the parameters of a party.

    Args:
        parties: The parties of the run.
        kinds: Parts of the party.
    """
    parameters = trainable = weights = adapters = 0
    # With tied weights, the head of a client is its embedding: one tensor in memory.
    is_tied = bool(getattr(parties.bottom.config, "tie_word_embeddings", False)) and "bottom" in kinds
    for kind in kinds:
        bits = parties.config.bits.get(kind, parties.facts.bits)
        gets_gradient = _gets_gradient(parties, kind)
        for part in parties.parts(kind):
            own = lora.local_parameters(part)
            for name, parameter in part.named_parameters():
                if is_tied and name in _HEAD_WEIGHTS and name not in own:
                    continue
                parameters += parameter.numel()
                if name in own:
                    # Adapters are float32, whatever the type of computation.
                    adapters += parameter.numel() * 4
                    trainable += parameter.numel() * (parameter.requires_grad and gets_gradient)
                else:
                    weights += _stored(part, name, parameter, bits)
    return Counts(parameters, trainable, weights, adapters)


def _gets_gradient(parties: Parties, kind: Kind) -> bool:
    """Returns True if the adapters of a part get gradients under the schedule of the run."""
    if kind == "bottom":
        return parties.schedule.returns_gradient
    return parties.schedule.learns or kind == "top"


def _party(
    parties: Parties, kinds: Sequence[Kind], activations: float, working: float, libraries: int, pending: int
) -> PartyMemory:
    """Returns the memory of a party with parts of some kinds. For the other arguments see `PartyMemory`."""
    counts = counts_of(parties, kinds)
    return PartyMemory(
        counts.parameters,
        counts.trainable,
        counts.weights,
        counts.adapters,
        moments=counts.trainable * _bytes_of_moments(parties),
        gradients=counts.trainable * 4,
        activations=round(activations),
        working=round(working),
        libraries=libraries,
        pending=pending,
    )


def _bytes_of_moments(parties: Parties) -> int:
    """Returns the bytes of the optimiser's state for one trained value."""
    train = parties.config.train
    if train.optimizer == "sgd":
        return 4 if train.momentum else 0
    # Two moments of one byte each, or of four.
    return 2 if train.optimizer == "adamw8bit" else 8


def _stored(part: Part, name: str, parameter: Tensor, bits: int) -> int:
    """Returns the bytes of a base weight in memory.

    Args:
        part: The part.
        name: Name of the weight in the part.
        parameter: The weight.
        bits: Bits of the weights of projections in blocks; 0 for the type of computation.
    """
    module_name = name.rpartition(".")[0]
    blocks = f"{part.family.decoder}.{part.family.blocks}."
    module: Any = part.get_submodule(module_name)
    is_projection = module_name.startswith(blocks) and isinstance(module, nn.Linear | Conv1D) and parameter.ndim == 2
    if not bits or not is_projection or is_uncalled(module_name, part.family):
        return parameter.numel() * parameter.element_size()
    # One scale in float32 for each block of 4-bit values, or for each row of 8-bit values.
    scales = parameter.numel() // _BLOCK_OF_4_BIT if bits == 4 else parameter.shape[0]
    return parameter.numel() * bits // 8 + 4 * scales
