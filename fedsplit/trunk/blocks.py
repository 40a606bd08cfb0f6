"""Forward and backward through the trunk's blocks, with any snapshot of an adapter.

Shapes: B sequences of T tokens a step, D the width of hidden states. A joined batch has all N rows, and the longest T.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsplit.adaptation import folding, lora
from fedsplit.adaptation.base_weights import without_adapter
from fedsplit.lowrank import LowRank
from fedsplit.model.devices import CPU, device_of, random_state, seed_generators, set_random_state
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
    """A part of the model that computes with any snapshot of the adapter.

    Several threads may call `run`; one of the calls computes at a time. `differentiate` may run beside `run`.

    Attributes:
        part: The trunk's blocks, with adapters.
        device: Device of the inputs and outputs, and of the snapshots: that of the first block.
        has_successor: True if a further stage of the trunk follows, with dropout that continues the blocks' dropout.
    """

    def __init__(self, part: Trunk, has_successor: bool = False) -> None:
        """Takes over a part with adapters.

        Args:
            part: The part.
            has_successor: True if a further stage of the trunk follows.
        """
        self.part = part
        self.has_successor = has_successor
        self.device = device_of(part)
        # The places for the tensors of a snapshot. `torch.func.functional_call` would find the places, too, but looks
        # at every parameter of the part for each call, which takes 3 % of a step of the bundled model.
        self._slots: dict[str, tuple[nn.Module, str, torch.device]] = {}
        for name, parameter in lora.local_parameters(part).items():
            module, leaf = _slot(part, name)
            self._slots[lora.exported_name(part, name)] = (module, leaf, parameter.device)
        # `fork_rng` saves the state of the CPU's generator in any case.
        self._generators = {parameter.device for parameter in part.parameters()} - {CPU}
        self._placed: AdapterSnapshot = dict(lora.parameters(part))  # to notice a change of ranks
        self._committed: dict[str, Tensor] = {}  # former base weights of layers that changed since the last commit
        # A snapshot is put into the modules themselves, so two forwards at once would mix their adapters.
        self._running = threading.Lock()

    def _place(self, snapshot: AdapterSnapshot) -> None:
        """Puts the tensors of a snapshot into the layers of the part."""
        for name, (module, leaf, device) in self._slots.items():
            # A snapshot is on one device. autograd brings the gradient from the device of the block back to it.
            placed = self._piece(name, snapshot[name]).to(device)
            module._parameters[leaf] = placed  # type: ignore[assignment]  # a leaf that is no nn.Parameter
        # PEFT keeps alpha / rank as a number in each layer, and clients may differ in rank.
        has_new_ranks = any(tensor.shape != snapshot[name].shape for name, tensor in self._placed.items())
        if has_new_ranks:
            lora.rescale(self.part)
        self._placed = snapshot

    def run(self, batch: PendingBatch, keeps_graph: bool, training: bool = True) -> Output:
        """Computes the forward of a batch, with the batch's snapshot and dropout. A repetition gives equal bits.

        Args:
            batch: The batch.
            keeps_graph: True to keep the autograd graph for `differentiate`.
            training: True for dropout.
        """
        hidden, mask = batch.join()
        with self.computing(batch.snapshot, batch.seed, keeps_graph, training, batch.is_adapted):
            if not batch.sums:
                # Arguments are evaluated in order: the generator is read after the forward, and before `computing`
                # resets it.
                return Output(self.part(hidden, mask), {}, self._random_behind(training))
            with listening(self.part) as heard:
                output = self.part(hidden, mask)
            sums = self._sums_behind(batch, heard, hidden.shape[:2])
            return Output(output, sums, self._random_behind(training))

    def _random_behind(self, training: bool) -> Tensor | None:
        """Returns the state of the random generator for the next stage; None if no stage follows, or without dropout.

        A trunk in one piece draws the dropout of all blocks from one generator. So do stages that hand the state on.
        """
        if not (training and self.has_successor):
            return None
        return random_state(self.device)

    def _piece(self, name: str, tensor: Tensor) -> Tensor:
        """Returns what the part holds of a tensor of an adapter: all of it."""
        return tensor

    @contextlib.contextmanager
    def computing(
        self,
        snapshot: AdapterSnapshot,
        seed: int | Tensor,
        keeps_graph: bool,
        training: bool,
        is_adapted: bool = True,
    ) -> Iterator[None]:
        """Prepares the part for one forward.

        Args:
            snapshot: Snapshot of the adapter.
            seed: Seed of the dropout, or the state of the random generator.
            keeps_graph: True to keep the autograd graph.
            training: True for dropout.
            is_adapted: False for the base weights alone.
        """
        # The lock comes first: mode, generators and adapter of the part belong to one forward at a time.
        with self._running, torch.set_grad_enabled(keeps_graph), _seeded(seed, self._generators, self.device):
            if self.part.training != training:  # `train` visits every module of the part
                self.part.train(training)
            self._place(snapshot)
            with contextlib.nullcontext() if is_adapted else without_adapter(self.part):
                yield

    def _sums_behind(
        self, batch: PendingBatch, heard: Sequence[Tensor], shape: Sequence[int]
    ) -> dict[StepKey, RouterSums]:
        """Returns each step's router sums behind the trunk: the bottom's sums, and the trunk's routers added.

        Args:
            batch: The batch.
            heard: Probabilities of each router, for the N * T tokens of the joined batch.
            shape: Shape of the joined batch, (N, T).
        """
        by_layer = []
        for probabilities in heard:
            by_row = probabilities.to(self.device).unflatten(0, tuple(shape))
            by_layer.append(batch.cut(by_row))
        chosen = self.part.config.num_experts_per_tok
        sums_behind = {}
        for key, sums in batch.sums.items():
            of_step = [layer[key].flatten(0, 1) for layer in by_layer]
            sums_behind[key] = sums.after(of_step, chosen, batch.masks.get(key))
        return sums_behind

    def differentiate(
        self,
        batch: PendingBatch,
        output: Output,
        sent: Mapping[StepKey, Tensor],
        by_sums: Mapping[StepKey, Tensor],
    ) -> Gradients:
        """Computes the backward of a batch.

        Args:
            batch: The batch.
            output: Result of the batch's forward. The graph is used up.
            sent: Gradients (B, T, D) by the output, of some or all steps.
            by_sums: Gradients (E,) by the router sums, of the steps with an auxiliary loss.

        Returns:
            Gradients of the adapter by exported name (none for an adapter that does not learn), and gradients of the
            inputs (B, T, D) by step, for the steps in `sent` with a client that can use a gradient.

        Raises:
            Overflow: float16 cannot hold the gradients.
        """
        learned = {name: tensor for name, tensor in batch.snapshot.items() if tensor.requires_grad}
        inputs = {key: batch.inputs[key] for key in sent}
        wanted = {key: hidden for key, hidden in inputs.items() if hidden.requires_grad}
        sums = {key: output.sums[key].probabilities for key in by_sums}
        # Where nothing below the routers is trained, their probabilities have no graph, and autograd would refuse them.
        routed = [key for key, probabilities in sums.items() if probabilities.requires_grad]

        outputs = [output.hidden]
        starts = [batch.spread(sent, output.hidden)]
        for key in routed:
            outputs.append(sums[key])
            starts.append(by_sums[key])
        leaves = [*learned.values(), *wanted.values()]
        gradients = _gradients(outputs, leaves, starts)

        count = len(learned)
        of_adapter = dict(zip(learned, gradients[:count], strict=True))
        of_inputs = dict(zip(wanted, gradients[count:], strict=True))
        return of_adapter, of_inputs

    def inference(self, snapshot: AdapterSnapshot) -> Trunk:
        """Returns the part with a snapshot and without dropout. The next call of any method may change the part."""
        if self.part.training:
            self.part.eval()
        self._place(snapshot)
        return self.part

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds matrices to the base weights for good.

        Args:
            changes: Matrices by layer of the unsplit model. Layers of bottom and top are ignored.
        """
        # Of a layer that is folded twice, the weights before the first fold are the committed ones.
        new = changes.keys() - self._committed.keys()
        self._committed |= folding.base_weights(self.part, new)
        folding.fold(self.part, changes)

    def unfold(self) -> None:
        """Sets the base weights back to the values at the last `commit`.

        A copy of the former weights is put back: a subtraction would not give the same bits.
        """
        folding.put_back(self.part, self._committed)
        self._committed = {}

    def commit(self) -> None:
        """Makes changes of base weights final. The former weights are no longer kept."""
        self._committed = {}

    def weigh(self, sequences: int, length: int, adapter: TrainableAdapter) -> tuple[int, int]:
        """Measures the memory of one step. The adapter stays as it is.

        Args:
            sequences: Sequences of the step.
            length: Tokens of a sequence.
            adapter: Adapter to compute with.

        Returns:
            Bytes in the graph of the step, and the largest growth of resident memory during the computation.
        """
        key = StepKey(0, 0, 0)
        hidden = torch.zeros(
            (sequences, length, self.part.config.hidden_size),
            dtype=self.part.dtype,
            device=self.device,
            requires_grad=True,
        )
        batch = PendingBatch({key: hidden}, {}, adapter, adapter.snapshot, seed=0)
        weights = (*self.part.parameters(), *batch.snapshot.values())
        there_anyway = {tensor.untyped_storage().data_ptr() for tensor in weights}
        saved: dict[int, int] = {}

        # By storage, since a graph saves many views of the same memory, and the weights are there anyway.
        def remember(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there_anyway:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        before = resident_memory()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            output = self.run(batch, keeps_graph=True)
        gradient = torch.zeros_like(output.hidden)
        self.differentiate(batch, output, {key: gradient}, {})
        graph = sum(saved.values())
        growth = peak_memory() - before
        return graph, max(growth, graph)  # the growth is too small if the process had a higher peak before


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the gradients of leaves, given gradients of the outputs. Under float16 the result is in float32.

    A leaf without influence, such as the adapter of an expert that no token has chosen, has a gradient of zeros.

    Raises:
        Overflow: float16 cannot hold the gradients.
    """
    if outputs[0].dtype != torch.float16:
        # Not `backward`, which adds to `.grad`: several pending batches share the leaves of one snapshot.
        return torch.autograd.grad(outputs, inputs, starts, materialize_grads=True)
    # `outputs` has no router sums here: the settings refuse a balancing loss in float16.
    computed = []
    found = gradients(outputs[0], inputs, starts[0])
    for leaf, gradient in zip(inputs, found, strict=True):
        computed.append(torch.zeros_like(leaf) if gradient is None else gradient)
    return computed


def _slot(part: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that holds a parameter, and the parameter's name in the module."""
    path, _, leaf = name.rpartition(".")
    return part.get_submodule(path), leaf


@contextlib.contextmanager
def _seeded(seed: int | Tensor, devices: Collection[torch.device], first: torch.device) -> Iterator[None]:
    """Draws dropout from a seed or from a state, and restores the random states of the CPU and of `devices` at the end.

    Args:
        seed: Seed, or the state of the generator of `first`.
        devices: Devices of the blocks other than the CPU.
        first: Device of the first block.
    """
    kind = next((device.type for device in devices), CPU.type)
    with torch.random.fork_rng(devices=list(devices), device_type=kind):
        if isinstance(seed, int):
            seed_generators(seed, devices)
        else:
            set_random_state(seed, first)
        yield
