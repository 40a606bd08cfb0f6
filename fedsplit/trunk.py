"""The server half of a step: the shared middle of the model, its adapter and its optimiser.

A plain class that knows nothing of processes; `fedsplit.actor` puts it into one of its own.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from fedsplit import adapters
from fedsplit.config import TrainSettings, derive_seed
from fedsplit.optim import make_optimizer
from fedsplit.schedules import SCHEDULES
from fedsplit.split import Trunk
from fedsplit.updates import Adapters, Packet, StepKey
from fedsplit.wire import Codec


class UnknownStep(Exception):
    """A gradient for a step that has no pending forward."""


@dataclass(frozen=True)
class _Pending:
    """A forward whose backward has not come: the graph, and the adapter it was computed with."""

    hidden: Tensor
    output: Tensor
    version: Mapping[str, Tensor]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws dropout from a seed of its own and leaves the global state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class TrunkServer:
    """Answers forwards and backwards of many clients on one set of blocks.

    The adapter exists in versions that never change: a step publishes a new one, and a forward that is
    pending keeps the version it was computed with. So the gradient a client gets back is exact for the
    weights its activations came from, however many steps of others lie between.

    Attributes:
        traffic: Bytes by direction ("activation_up", …), of training and, under "evaluation_…", of evaluation.
    """

    def __init__(self, part: Trunk, codec: Codec, schedule: str, settings: TrainSettings, seed: int) -> None:
        """Takes over a part.

        Args:
            part: The trunk with its adapters.
            codec: How tensors are encoded, the same at the clients.
            schedule: One of `fedsplit.schedules.SCHEDULES`.
            settings: The optimiser's.
            seed: The run's seed, for dropout.
        """
        self._part, self._codec, self._seed = part, codec, seed
        self._schedule = SCHEDULES[schedule]
        self._trained = adapters.local_parameters(part)
        self._optimizer = make_optimizer(self._trained.values(), settings)
        self._pending: dict[StepKey, _Pending] = {}
        self.traffic: Counter[str] = Counter()
        self._publish()

    def _publish(self) -> None:
        self._version = {
            name: parameter.detach().clone().requires_grad_(self._schedule.learns)
            for name, parameter in self._trained.items()
        }

    def _run(self, packet: Packet) -> tuple[Tensor, Tensor]:
        hidden = self._codec.decode(packet.tensors["hidden"])
        mask = self._codec.decode(packet.tensors["mask"]) if "mask" in packet.tensors else None
        hidden.requires_grad_(packet.wants_gradient and self._schedule.returns_gradient)
        return hidden, functional_call(self._part, self._version, (hidden, mask))

    def forward(self, packet: Packet) -> Packet:
        """Hidden states (B, T, D) in, hidden states (B, T, D) out.

        In training the graph is kept until the backward of the same key; dropout is drawn from the run's
        seed and the key, so that it does not depend on what other clients do.
        """
        key = packet.key
        self._part.train(packet.training)
        keeps_graph = packet.training and self._schedule.expects_backward(packet.wants_gradient)
        seed = derive_seed(self._seed, "trunk", key.round, key.client, key.step)
        with torch.set_grad_enabled(keeps_graph), _seeded(seed):
            hidden, output = self._run(packet)
        if keeps_graph:
            self._pending[key] = _Pending(hidden, output, self._version)
        answer = Packet(key, {"hidden": self._codec.encode(output)}, packet.training)
        self._count("activation", packet, answer)
        return answer

    def backward(self, packet: Packet) -> Packet:
        """The gradient (B, T, D) of the loss by the trunk's output in, by its input out.

        Under a schedule that learns, the trunk's optimiser makes one step with the gradient of its adapter.

        Raises:
            UnknownStep: No forward of that key is pending.
        """
        pending = self._pending.pop(packet.key, None)
        if pending is None:
            raise UnknownStep(f"no forward is pending for {packet.key}")
        wanted = {name: tensor for name, tensor in pending.version.items() if tensor.requires_grad}
        inputs = [*wanted.values(), *([pending.hidden] if pending.hidden.requires_grad else [])]
        gradients = torch.autograd.grad(pending.output, inputs, self._codec.decode(packet.tensors["gradient"]))
        if wanted:
            self._step(dict(zip(wanted, gradients, strict=False)))
        tensors = {"gradient": self._codec.encode(gradients[-1])} if pending.hidden.requires_grad else {}
        answer = Packet(packet.key, tensors)
        self._count("gradient", packet, answer)
        return answer

    def _step(self, gradients: Mapping[str, Tensor]) -> None:
        assert self._optimizer is not None
        for name, gradient in gradients.items():
            self._trained[name].grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._publish()

    def _count(self, what: str, up: Packet, down: Packet) -> None:
        prefix = "" if up.training else "evaluation_"
        self.traffic[f"{prefix}{what}_up"] += up.nbytes
        self.traffic[f"{prefix}{what}_down"] += down.nbytes

    def forget_pending(self) -> int:
        """Frees forwards whose backward never came, as when a client failed; returns how many."""
        forgotten = len(self._pending)
        self._pending.clear()
        return forgotten

    def read(self) -> Adapters:
        """The trunk's adapter as it is now."""
        return adapters.read(self._part)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the trunk's adapter; pending forwards keep the version they had."""
        adapters.write(tensors, self._part)
        self._publish()

    def count(self) -> dict[str, int]:
        """Total and trainable parameters."""
        counted = adapters.count(self._part)
        return counted if self._schedule.learns else {**counted, "trainable": 0}
