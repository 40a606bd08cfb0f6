"""The trunk's blocks: what they compute, forward and backward, with one version of an adapter after another.

Shapes: B sequences of T tokens a step, D the width of hidden states; joined, all rows N and the longest T.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsplit.adaptation import lora
from fedsplit.model.devices import CPU, device_of
from fedsplit.model.parts import Trunk
from fedsplit.model.routers import RouterSums, listening
from fedsplit.trunk.flights import Flight, Output
from fedsplit.trunk.learner import Learner, Version
from fedsplit.trunk.memory import peak_memory, resident_memory
from fedsplit.wire.packets import StepKey
from fedsplit.wire.scaling import gradients

Gradients = tuple[dict[str, Tensor], dict[StepKey, Tensor]]
"""Of an adapter by exported name, and of the inputs (B, T, D) by step."""


class Blocks:
    """A part whose adapter is exchanged for another version of it before every use.

    `run` may be called by several threads, of which one computes at a time; `differentiate` beside it.

    Attributes:
        part: The trunk's blocks, with adapters.
        device: What they compute on.
    """

    def __init__(self, part: Trunk) -> None:
        """Takes over a part, with its adapters."""
        self.part, self.device = part, device_of(part)
        # Where a version is put before it computes. `torch.func.functional_call` does the same, but looks at
        # every parameter of the part each time, which takes 3 % of a step of the bundled model.
        self._slots = {lora.exported_name(part, n): _slot(part, n) for n in lora.local_parameters(part)}
        self._placed: Version = dict(lora.parameters(part))  # what is there has a rank, too
        self._running = threading.Lock()

    def _place(self, version: Version) -> None:
        """Puts a version where the part's layers look for it."""
        for name, (module, leaf) in self._slots.items():
            module._parameters[leaf] = version[name]  # type: ignore[assignment]  # a leaf that is no nn.Parameter
        if any(tensor.shape != version[name].shape for name, tensor in self._placed.items()):
            lora.rescale(self.part)
        self._placed = version

    def run(self, flight: Flight, keeps_graph: bool, training: bool = True) -> Output:
        """A flight's forward, with its own version and dropout: computed again, it gives the same to the bit."""
        hidden, mask = flight.join()
        with self._running, torch.set_grad_enabled(keeps_graph), _seeded(flight.seed, self.device):
            if self.part.training != training:
                self.part.train(training)
            self._place(flight.version)
            if not flight.sums:
                return Output(self.part(hidden, mask), {})
            with listening(self.part) as heard:
                output = self.part(hidden, mask)
            return Output(output, self._sums_behind(flight, heard, hidden.shape[:2]))

    def _sums_behind(self, flight: Flight, heard: Sequence[Tensor], shape: Sequence[int]) -> dict[StepKey, RouterSums]:
        """Each step's sums with its own rows of what the routers said of the joined batch, (N, T) tokens."""
        own = [flight.cut(probabilities.unflatten(0, tuple(shape))) for probabilities in heard]
        chosen = self.part.config.num_experts_per_tok
        return {
            key: sums.after([layer[key].flatten(0, 1) for layer in own], chosen, flight.masks.get(key))
            for key, sums in flight.sums.items()
        }

    def differentiate(
        self, flight: Flight, output: Output, sent: Mapping[StepKey, Tensor], by_sums: Mapping[StepKey, Tensor]
    ) -> Gradients:
        """A flight's backward.

        Args:
            flight: The flight.
            output: What its forward made, whose graph is used up.
            sent: Gradients (B, T, D) by the output, of some or all steps.
            by_sums: Gradients (E,) by the routers' sums, of those steps that have such.

        Returns:
            Gradients of the adapter by exported name, empty where it does not learn; and by the inputs (B, T, D), of
            the steps in `sent` whose client can use them.

        Raises:
            Overflow: float16 cannot hold them.
        """
        learned = {name: tensor for name, tensor in flight.version.items() if tensor.requires_grad}
        wanted = {key: flight.inputs[key] for key in sent if flight.inputs[key].requires_grad}
        sums = {key: output.sums[key].probabilities for key in by_sums}
        routed = [key for key, probabilities in sums.items() if probabilities.requires_grad]
        found = _gradients(
            [output.hidden, *(sums[key] for key in routed)],
            [*learned.values(), *wanted.values()],
            [flight.spread(sent, output.hidden), *(by_sums[key] for key in routed)],
        )
        of_adapter = dict(zip(learned, found, strict=False))
        return of_adapter, dict(zip(wanted, found[len(learned) :], strict=True))

    def inference(self, version: Version) -> Trunk:
        """The part without dropout, ready to compute with a version until something else is asked for."""
        if self.part.training:
            self.part.eval()
        self._place(version)
        return self.part

    def weigh(self, batch: int, length: int, learner: Learner) -> tuple[int, int]:
        """Runs one step that leaves nothing behind, to see what memory one needs.

        Args:
            batch: Sequences of the step.
            length: Tokens of a sequence.
            learner: Whose adapter it is computed with.

        Returns:
            Bytes that its graph holds, and that computing it added to resident memory at the worst.
        """
        key = StepKey(0, 0, 0)
        size = batch, length, self.part.config.hidden_size
        hidden = torch.zeros(size, dtype=self.part.dtype, device=self.device, requires_grad=True)
        flight = Flight({key: hidden}, {}, learner, learner.version, 0)
        storages: dict[int, int] = {}
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.part.parameters(), *flight.version.values())}

        def saved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        before = resident_memory()
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            output = self.run(flight, keeps_graph=True)
        self.differentiate(flight, output, {key: torch.zeros_like(output.hidden)}, {})
        graph = sum(storages.values())
        return graph, max(peak_memory() - before, graph)


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of leaves, given those of the outputs; in float32 where there is one output in float16.

    Raises:
        Overflow: float16 cannot hold them.
    """
    if outputs[0].dtype != torch.float16:
        return torch.autograd.grad(outputs, inputs, starts)
    found = gradients(outputs[0], inputs, starts[0])
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, found, strict=True)]


def _slot(part: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and what the parameter is called there."""
    path, _, leaf = name.rpartition(".")
    return part.get_submodule(path), leaf


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws dropout from a seed of its own and leaves the global state as it was."""
    with torch.random.fork_rng(devices=[] if device == CPU else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
