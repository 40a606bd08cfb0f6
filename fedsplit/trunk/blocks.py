"""Forward and backward through the trunk's blocks, with one snapshot of an adapter after another.

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
from fedsplit.trunk.memory import peak_memory, resident_memory
from fedsplit.trunk.pending import Output, PendingBatch
from fedsplit.trunk.trainable import AdapterSnapshot, TrainableAdapter
from fedsplit.wire.packets import StepKey
from fedsplit.wire.scaling import gradients

Gradients = tuple[dict[str, Tensor], dict[StepKey, Tensor]]
"""Gradients of an adapter by exported name, and of the inputs (B, T, D) by step."""


class Blocks:
    """A part of the model that computes with any snapshot of its adapter.

    `run` may be called by several threads, of which one computes at a time; `differentiate` may run beside it.

    Attributes:
        part: The trunk's blocks, with adapters.
        device: Device that they compute on.
    """

    def __init__(self, part: Trunk) -> None:
        """Takes over a part, with its adapters."""
        self.part = part
        self.device = device_of(part)
        # Where the tensors of a snapshot are put before it computes. `torch.func.functional_call` does the same, but
        # looks at every parameter of the part each time, which takes 3 % of a step of the bundled model.
        self._slots = {lora.exported_name(part, name): _slot(part, name) for name in lora.local_parameters(part)}
        self._placed: AdapterSnapshot = dict(lora.parameters(part))  # the part's own tensors have a rank, too
        self._running = threading.Lock()

    def _place(self, snapshot: AdapterSnapshot) -> None:
        """Puts the tensors of a snapshot where the part's layers look for them."""
        for name, (module, leaf) in self._slots.items():
            module._parameters[leaf] = snapshot[name]  # type: ignore[assignment]  # a leaf that is no nn.Parameter
        if any(tensor.shape != snapshot[name].shape for name, tensor in self._placed.items()):
            lora.rescale(self.part)
        self._placed = snapshot

    def run(self, batch: PendingBatch, keeps_graph: bool, training: bool = True) -> Output:
        """Computes the forward of a batch, with its snapshot and dropout. A repetition gives equal bits."""
        hidden, mask = batch.join()
        with self._running, torch.set_grad_enabled(keeps_graph), _seeded(batch.seed, self.device):
            if self.part.training != training:
                self.part.train(training)
            self._place(batch.snapshot)
            if not batch.sums:
                return Output(self.part(hidden, mask), {})
            with listening(self.part) as heard:
                output = self.part(hidden, mask)
            return Output(output, self._sums_behind(batch, heard, hidden.shape[:2]))

    def _sums_behind(
        self, batch: PendingBatch, heard: Sequence[Tensor], shape: Sequence[int]
    ) -> dict[StepKey, RouterSums]:
        """Adds to each step's sums what the routers said of its rows.

        Args:
            batch: The batch.
            heard: Probabilities of each router, for the N * T tokens of the joined batch.
            shape: Shape of the joined batch, (N, T).
        """
        by_layer = [batch.cut(probabilities.unflatten(0, tuple(shape))) for probabilities in heard]
        chosen = self.part.config.num_experts_per_tok
        return {
            key: sums.after([layer[key].flatten(0, 1) for layer in by_layer], chosen, batch.masks.get(key))
            for key, sums in batch.sums.items()
        }

    def differentiate(
        self, batch: PendingBatch, output: Output, sent: Mapping[StepKey, Tensor], by_sums: Mapping[StepKey, Tensor]
    ) -> Gradients:
        """Computes a batch backward.

        Args:
            batch: The batch.
            output: Result of its forward, whose graph is used up.
            sent: Gradients (B, T, D) by the output, of some or all steps.
            by_sums: Gradients (E,) by the routers' sums, of the steps that have any.

        Returns:
            Gradients of the adapter by exported name, empty where it does not learn; and of the inputs (B, T, D), for
            those steps in `sent` whose client can use them.

        Raises:
            Overflow: float16 cannot hold them.
        """
        learned = {name: tensor for name, tensor in batch.snapshot.items() if tensor.requires_grad}
        wanted = {key: batch.inputs[key] for key in sent if batch.inputs[key].requires_grad}
        sums = {key: output.sums[key].probabilities for key in by_sums}
        routed = [key for key, probabilities in sums.items() if probabilities.requires_grad]
        found = _gradients(
            [output.hidden, *(sums[key] for key in routed)],
            [*learned.values(), *wanted.values()],
            [batch.spread(sent, output.hidden), *(by_sums[key] for key in routed)],
        )
        of_adapter = dict(zip(learned, found, strict=False))
        of_inputs = dict(zip(wanted, found[len(learned) :], strict=True))
        return of_adapter, of_inputs

    def inference(self, snapshot: AdapterSnapshot) -> Trunk:
        """Returns the part with a snapshot and without dropout, ready to compute until the next call of this object."""
        if self.part.training:
            self.part.eval()
        self._place(snapshot)
        return self.part

    def weigh(self, sequences: int, length: int, adapter: TrainableAdapter) -> tuple[int, int]:
        """Measures the memory of one step, which leaves nothing behind.

        Args:
            sequences: Sequences of the step.
            length: Tokens of a sequence.
            adapter: Adapter to compute it with.

        Returns:
            Bytes in the graph of the step, and the largest growth of resident memory during the computation.
        """
        key = StepKey(0, 0, 0)
        shape = sequences, length, self.part.config.hidden_size
        hidden = torch.zeros(shape, dtype=self.part.dtype, device=self.device, requires_grad=True)
        batch = PendingBatch({key: hidden}, {}, adapter, adapter.snapshot, 0)
        weights = (*self.part.parameters(), *batch.snapshot.values())
        there_anyway = {tensor.untyped_storage().data_ptr() for tensor in weights}
        saved: dict[int, int] = {}

        def remember(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there_anyway:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        before = resident_memory()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            output = self.run(batch, keeps_graph=True)
        self.differentiate(batch, output, {key: torch.zeros_like(output.hidden)}, {})
        graph = sum(saved.values())
        return graph, max(peak_memory() - before, graph)


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the gradients of leaves, given those of the outputs; in float32 where the output is in float16.

    Raises:
        Overflow: float16 cannot hold them.
    """
    if outputs[0].dtype != torch.float16:
        return torch.autograd.grad(outputs, inputs, starts)
    found = gradients(outputs[0], inputs, starts[0])
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, found, strict=True)]


def _slot(part: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that holds a parameter, and the parameter's name in it."""
    path, _, leaf = name.rpartition(".")
    return part.get_submodule(path), leaf


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws dropout from a given seed, and leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[] if device == CPU else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
