"""The trunk's blocks in several processes, each with a piece of every projection.

The first process leads: it has the service, the adapters and their optimisers. Before it computes, it says to the
others what to compute, and all go through the same steps. A snapshot of an adapter is whole in every process, and each
process puts its pieces into its layers. So the gradients are whole, too, with zeros outside the pieces, and their sum
over the processes is the gradient.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.errors import first_line
from fedsplit.lowrank import LowRank
from fedsplit.model.caches import PartCache
from fedsplit.model.parts import Trunk
from fedsplit.model.process_group import ProcessGroup
from fedsplit.model.tensor_parallel import COLUMNS, connect, cut_of_factor
from fedsplit.trunk.blocks import Blocks, Gradients
from fedsplit.trunk.pending import Output, PendingBatch
from fedsplit.trunk.trainable import AdapterSnapshot
from fedsplit.wire.packets import StepKey
from fedsplit.wire.transport import TrunkLost


class ShardedBlocks(Blocks):
    """Blocks with this process's pieces of the projections."""

    def __init__(self, part: Trunk, styles: Mapping[str, str], group: ProcessGroup) -> None:
        """Takes over a part with adapters.

        Args:
            part: The part, with this process's pieces.
            styles: How each projection is cut (`fedsplit.model.tensor_parallel.styles_of`).
            group: The processes.
        """
        super().__init__(part)
        self._group = group
        self._styles = styles
        self._cuts: dict[str, int | None] = {}
        for name in lora.local_parameters(part):
            self._cuts[lora.exported_name(part, name)] = cut_of_factor(name, styles)
        connect(part, styles, group)

    def _piece(self, name: str, tensor: Tensor) -> Tensor:
        """Returns this process's piece of a tensor of an adapter."""
        dimension = self._cuts[name]
        if dimension is None:
            return tensor
        place = self._group.shard.of(tensor.shape[dimension])
        return tensor.narrow(dimension, place.start, place.stop - place.start)

    def summed(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sums over all processes of gradients by exported name."""
        if not gradients:
            return {}
        # One tensor, since every sum over the processes is a message of its own.
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
        sizes = [gradient.numel() for gradient in gradients.values()]
        pieces = self._group.summed(flat).split(sizes)
        summed = {}
        for name, piece in zip(gradients, pieces, strict=True):
            summed[name] = piece.view_as(gradients[name])
        return summed

    @torch.no_grad()
    def extend(
        self,
        snapshot: AdapterSnapshot,
        cache: PartCache,
        start: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Continues the sequences of a session; see `fedsplit.model.parts.Part.extend`."""
        return Blocks.inference(self, snapshot).extend(start, mask, positions, cache)

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds this process's pieces of matrices to its base weights; see `Blocks.fold`."""
        shard = self._group.shard
        pieces = {}
        for name, style in self._styles.items():
            layer = self.part.unsplit_name(name)
            change = changes.get(layer)
            if change is None:
                continue
            # The change is up @ down: outputs are rows of up, inputs are columns of down.
            outputs, inputs = change.shape
            if style in COLUMNS:
                pieces[layer] = LowRank(change.up[shard.of(outputs)], change.down)
            else:
                pieces[layer] = LowRank(change.up, change.down[:, shard.of(inputs)])
        super().fold(pieces)


@dataclass(frozen=True, eq=False)
class _NumberedOutput(Output):
    """Result of a forward, with a graph in every process.

    Attributes:
        number: Number of the graphs in the other processes.
    """

    number: int = 0


class LeadingBlocks(ShardedBlocks):
    """The first process's blocks, which lead those of the others.

    After the loss of a process the trunk is lost: some pieces of the weights are gone. After an error in one process
    the processes are not in step any more. So every error during a computation is the loss of the trunk.
    """

    def __init__(
        self,
        part: Trunk,
        styles: Mapping[str, str],
        group: ProcessGroup,
        on_loss: Callable[[], object] = lambda: None,
    ) -> None:
        """Takes over a part with adapters.

        Args:
            part: The part, with this process's pieces.
            styles: How each projection is cut.
            group: The processes.
            on_loss: Called at the loss of the trunk.
        """
        super().__init__(part, styles, group)
        self._on_loss = on_loss
        self._lost: TrunkLost | None = None
        self._numbers = itertools.count(1)
        self._freed: list[int] = []  # numbers of graphs and caches that nobody needs any more
        self._sent: AdapterSnapshot | None = None
        self._caches: weakref.WeakKeyDictionary[PartCache, int] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Guards a computation in all processes.

        Raises:
            TrunkLost: A process is gone, or is not in step with this one.
        """
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except BaseException as error:
            self._lost = TrunkLost(f"a process of the trunk is lost, or not in step ({first_line(error)})")
            self._on_loss()
            if isinstance(error, Exception):
                raise self._lost from error
            raise

    def _say(self, action: str, tensors: Sequence[Tensor | None] = (), **fields: Any) -> None:
        """Says to the other processes what to do next, and which graphs and caches to free."""
        # `pop`, since the garbage collector may append a number at any time, from any thread.
        freed = [self._freed.pop() for _ in range(len(self._freed))]
        self._group.say({"action": action, "freed": freed, "arguments": fields}, tensors)

    def _say_snapshot(self, snapshot: AdapterSnapshot) -> None:
        """Sends a snapshot to the other processes, unless it is the last that was sent."""
        if snapshot is self._sent:
            return
        shapes = {name: list(tensor.shape) for name, tensor in snapshot.items()}
        learned = [name for name, tensor in snapshot.items() if tensor.requires_grad]
        rows = [tensor.detach().reshape(-1) for tensor in snapshot.values()]
        # One tensor, since every tensor is a message of its own.
        flat = torch.cat(rows)
        self._say("take_snapshot", [flat], shapes=shapes, learned=learned)
        self._sent = snapshot

    def run(self, batch: PendingBatch, keeps_graph: bool, training: bool = True) -> Output:
        """Computes the forward of a batch in all processes; see `Blocks.run`."""
        hidden, mask = batch.join()
        number = next(self._numbers) if keeps_graph else 0
        assert isinstance(batch.seed, int)  # a state of the generator comes from a stage below, and there is none
        how = {"seed": batch.seed, "training": training, "wants_gradient": hidden.requires_grad}
        how["is_adapted"] = batch.is_adapted
        with self._together():
            self._say_snapshot(batch.snapshot)
            self._say("forward", [hidden, mask], number=number, **how)
            output = _NumberedOutput(super().run(batch, keeps_graph, training).hidden, {}, number=number)
        if keeps_graph:
            # When this process drops the output, the other processes learn with the next message to drop their graphs.
            weakref.finalize(output, self._freed.append, number)
        return output

    def differentiate(
        self,
        batch: PendingBatch,
        output: Output,
        sent: Mapping[StepKey, Tensor],
        by_sums: Mapping[StepKey, Tensor],
    ) -> Gradients:
        """Computes the backward of a batch in all processes; see `Blocks.differentiate`."""
        assert isinstance(output, _NumberedOutput)
        start = batch.spread(sent, output.hidden)
        wants_input = any(batch.inputs[key].requires_grad for key in sent)
        with self._together():
            self._say("backward", [start], number=output.number, wants_input=wants_input)
            of_adapter, of_inputs = super().differentiate(batch, output, sent, by_sums)
            return self.summed(of_adapter), of_inputs

    def inference(self, snapshot: AdapterSnapshot) -> Trunk:
        """Returns the part with a snapshot, for `Part.extend` alone, which then computes in all processes."""
        return cast(Trunk, _LeadingPart(self, snapshot))

    def extend(
        self,
        snapshot: AdapterSnapshot,
        cache: PartCache,
        start: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Continues the sequences of a session in all processes."""
        with self._together():
            if cache not in self._caches:
                self._caches[cache] = next(self._numbers)
                weakref.finalize(cache, self._freed.append, self._caches[cache])
            self._say_snapshot(snapshot)
            self._say("extend", [start, mask, positions], number=self._caches[cache])
            return super().extend(snapshot, cache, start, mask, positions)

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds matrices to the base weights of all processes; see `Blocks.fold`."""
        of_part = {self.part.unsplit_name(name) for name in self._styles}
        layers = [layer for layer in changes if layer in of_part]
        factors = []
        for layer in layers:
            factors.append(changes[layer].up.to(self.device))
            factors.append(changes[layer].down.to(self.device))
        with self._together():
            self._say("fold", factors, layers=layers)
            super().fold(changes)

    def unfold(self) -> None:
        """Sets the base weights of all processes back to the values at the last `commit`."""
        with self._together():
            self._say("unfold")
            super().unfold()

    def commit(self) -> None:
        """Makes changes of base weights final in all processes."""
        with self._together():
            self._say("commit")
            super().commit()


class _LeadingPart:
    """A part whose `extend` computes in all processes. All other attributes are the part's."""

    def __init__(self, blocks: LeadingBlocks, snapshot: AdapterSnapshot) -> None:
        self._blocks = blocks
        self._snapshot = snapshot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks.part, name)

    def extend(
        self,
        start: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: PartCache,
    ) -> Tensor:
        """Continues sequences; see `fedsplit.model.parts.Part.extend`."""
        return self._blocks.extend(self._snapshot, cache, start, mask, positions)


class Follower:
    """A process of the group that does what the first process says. The methods but `work` are what it may say."""

    def __init__(self, blocks: ShardedBlocks, group: ProcessGroup) -> None:
        """Starts without graphs and caches.

        Args:
            blocks: Blocks with this process's pieces.
            group: The processes.
        """
        self._blocks = blocks
        self._group = group
        self._snapshot: AdapterSnapshot = {}
        # By number: input, output and snapshot of a forward; keys and values of a session.
        self._graphs: dict[int, tuple[Tensor, Tensor, AdapterSnapshot]] = {}
        self._caches: dict[int, PartCache] = {}

    def work(self) -> None:
        """Does what the first process says, for ever.

        Raises:
            RuntimeError: The first process is gone, or a process has not come to the same step in time.
        """
        actions: dict[str, Callable[..., None]] = {
            "take_snapshot": self.take_snapshot,
            "forward": self.forward,
            "backward": self.backward,
            "extend": self.extend,
            "fold": self.fold,
            "unfold": self._blocks.unfold,
            "commit": self._blocks.commit,
        }
        while True:
            fields, tensors = self._group.hear()
            for number in fields["freed"]:
                self._graphs.pop(number, None)
                self._caches.pop(number, None)
            actions[fields["action"]](*tensors, **fields["arguments"])

    def take_snapshot(self, flat: Tensor, shapes: Mapping[str, Sequence[int]], learned: Sequence[str]) -> None:
        """Takes a snapshot for all steps until the next snapshot."""
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        pieces = flat.split(sizes)
        self._snapshot = {}
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
            # Leaves again: what crossed between processes has no graph.
            self._snapshot[name] = piece.view(*shape).requires_grad_(name in learned)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        number: int,
        seed: int,
        training: bool,
        wants_gradient: bool,
        is_adapted: bool = True,
    ) -> None:
        """Computes a forward. The graph is kept under the number; 0 keeps no graph."""
        hidden.requires_grad_(wants_gradient)
        with self._blocks.computing(self._snapshot, seed, number > 0, training, is_adapted):
            output = self._blocks.part(hidden, mask)
        if number:
            self._graphs[number] = (hidden, output, self._snapshot)

    def backward(self, start: Tensor, number: int, wants_input: bool) -> None:
        """Computes a backward, and adds the gradients of the adapter to those of the first process."""
        hidden, output, snapshot = self._graphs.pop(number)
        learned = {name: tensor for name, tensor in snapshot.items() if tensor.requires_grad}
        inputs = [hidden] if wants_input else []
        leaves = [*learned.values(), *inputs]
        # Zeros for leaves without influence, since all processes must add up tensors of the same sizes.
        gradients = torch.autograd.grad([output], leaves, [start], materialize_grads=True)
        # Not strict: the gradient of the input, the last one, is already equal in all processes.
        self._blocks.summed(dict(zip(learned, gradients, strict=False)))

    def extend(
        self,
        start: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        number: int,
    ) -> None:
        """Continues the sequences of a session."""
        if number not in self._caches:
            self._caches[number] = PartCache(self._blocks.part, len(start))
        cache = self._caches[number]
        self._blocks.extend(self._snapshot, cache, start, mask, positions)
        cache.length += start.shape[1]

    def fold(self, *factors: Tensor, layers: Sequence[str]) -> None:
        """Adds pieces of matrices to the base weights."""
        pairs = zip(layers, factors[::2], factors[1::2], strict=True)
        self._blocks.fold({layer: LowRank(up, down) for layer, up, down in pairs})
