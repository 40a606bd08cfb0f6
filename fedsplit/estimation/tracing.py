"""Memory of a part's forward and backward, by playing both on tensors without values.

torch's fake tensors have shapes, types and a device, and no memory. The part's own code runs on them as on a CPU, with
autograd. A tracker follows each allocation to its end, so that the result is the memory of tensors that the code really
asks for, and no formula that has to be kept up to date. Weights do not count.

Where the code asks for values, it is told the most expensive answer: every position has a label.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsplit.corpora.sequences import behind
from fedsplit.model.devices import CPU
from fedsplit.model.parts import Part

_FEW = (2, 3)
"""Numbers of blocks that are played in place of many equal ones. The rest is extrapolated."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """Memory of tensors during a forward and a backward, in bytes, without weights.

    Attributes:
        kept: Bytes of the autograd graph between forward and backward, with the output.
        forward: Largest number of bytes during the forward.
        backward: Largest number of bytes during the backward, with what is kept and with the gradients.
        dtype: Type of the output.
        needs_gradient: True if the output has a graph, so that a backward follows.
    """

    kept: float
    forward: float
    backward: float
    dtype: torch.dtype
    needs_gradient: bool

    @property
    def peak(self) -> float:
        """Largest number of bytes."""
        return max(self.forward, self.backward)


class AllocationTracker(TorchDispatchMode):
    """Follows the memory of all tensors that are made inside the context.

    Attributes:
        live: Bytes of the tensors that are alive.
        peak: Largest value of `live` so far.

    Example:
        >>> with AllocationTracker() as tracker:
        ...     kept = torch.zeros(10)
        ...     del kept
        ...     other = torch.zeros(5)
        >>> tracker.live, tracker.peak
        (20, 40)
    """

    def __init__(self, there_anyway: Iterator[Tensor] | None = None) -> None:
        """Starts without tensors.

        Args:
            there_anyway: Tensors that do not count, such as weights.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in there_anyway or ():
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, and counts the memory of its results."""
        result = _without_values(func, args, kwargs or {})
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor, once for all its views."""
        storage = tensor.untyped_storage()
        # The address of the storage, which all views share. A freed address may return: `_forget` has then removed
        # it.
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        # With the storage, and not with a tensor: views and the graph may keep the memory.
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _without_values(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Returns the result of an operation whose shape depends on values; NotImplemented for any other operation."""
    first = next((value for value in args if isinstance(value, FakeTensor)), None)
    if first is None:
        return NotImplemented
    if func is _aten.nonzero.default:
        return torch.empty((first.numel(), first.ndim), dtype=torch.long, device=first.device)
    if func is _aten._local_scalar_dense.default:
        return False if first.dtype == torch.bool else 1
    if func is _aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
        # The most expensive mask chooses every position.
        return first.new_empty(first.shape)
    if func is _aten._grouped_mm.default:  # its rule for fake tensors refuses float32, which the CPU can do
        left, right = args[0], args[1]
        if right.ndim == 3:
            return left.new_empty(left.shape[0], right.shape[2])
        offsets: Tensor = kwargs["offs"] if "offs" in kwargs else args[2]
        return left.new_empty(len(offsets), left.shape[0], right.shape[1])
    return NotImplemented


def trace(
    part: Part, rows: int, length: int, dtype: torch.dtype, input_needs_gradient: bool, classes: int = 0
) -> Trace:
    """Plays a training step of a part.

    Args:
        part: Bottom, trunk or top with adapters, on the meta device. Its weights become fake tensors.
        rows: Sequences B.
        length: Tokens T of a sequence, without virtual tokens.
        dtype: Type of the hidden states that come from the part below.
        input_needs_gradient: True if the hidden states that come need a gradient.
        classes: Number of classes of a classifier; 0 for a language model.

    Example:
        >>> from fedsplit.adaptation.run_adapters import outlined
        >>> from fedsplit.settings.config import Config
        >>> step = trace(outlined(Config(), "trunk"), 4, 128, torch.float32, input_needs_gradient=True)
        >>> step.kept < step.backward, step.dtype
        (True, torch.float32)
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake(part, mode)
    blocks = getattr(part.decoder, part.family.blocks)

    def play() -> Trace:
        with mode:
            return _play(part, rows, length, dtype, input_needs_gradient, classes)

    # Only equal blocks can be extrapolated, and a few blocks are played as quickly.
    if len(blocks) <= _FEW[1] or not _are_equal(blocks) or getattr(part.config, "is_heterogeneous", False):
        return play()
    # Three blocks less two are the cost of each further block.
    few, one_more = (_with_first_blocks(part, count, play) for count in _FEW)
    further = len(blocks) - _FEW[0]

    def extrapolated(name: str) -> float:
        first: float = getattr(few, name)
        return first + further * (getattr(one_more, name) - first)

    return Trace(
        extrapolated("kept"),
        extrapolated("forward"),
        extrapolated("backward"),
        one_more.dtype,
        one_more.needs_gradient,
    )


def _fake(part: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors in the place of a part's parameters and buffers."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in part.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    fake = FakeTensor(mode, parameter.detach().to("meta"), CPU)
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.detach().to("meta"), CPU)


def _are_equal(blocks: nn.ModuleList) -> bool:
    """Returns True if all blocks have parameters of the same names and shapes."""

    def form(block: nn.Module) -> list[tuple[str, torch.Size, bool]]:
        return [(name, parameter.shape, parameter.requires_grad) for name, parameter in block.named_parameters()]

    return all(form(block) == form(blocks[0]) for block in blocks)


def _with_first_blocks(part: Part, count: int, call: Callable[[], Trace]) -> Trace:
    """Calls a function while a part has its first blocks only."""
    blocks = getattr(part.decoder, part.family.blocks)
    depth = part.config.num_hidden_layers
    try:
        setattr(part.decoder, part.family.blocks, blocks[:count])
        part.config.num_hidden_layers = count
        return call()
    finally:
        setattr(part.decoder, part.family.blocks, blocks)
        part.config.num_hidden_layers = depth


def _play(
    part: Part,
    rows: int,
    length: int,
    dtype: torch.dtype,
    input_needs_gradient: bool,
    classes: int,
) -> Trace:
    """Plays a step of a part. For the arguments see `trace`."""
    # Dropout keeps a mask for the backward in training only.
    part.train()
    width = part.config.hidden_size
    ids = torch.zeros(rows, length, dtype=torch.long)
    labels, _ = behind(part.virtual, ids, None)
    if classes:
        labels = torch.zeros(rows, dtype=torch.long)
    weights = (tensor for tensor in (*part.parameters(), *part.buffers()))
    with AllocationTracker(weights) as tracker:
        if part.kind == "bottom":
            output = part(ids)
        else:
            hidden = torch.empty(rows, part.virtual + length, width, dtype=dtype).requires_grad_(input_needs_gradient)
            output = part(hidden, labels) if part.kind == "top" else part(hidden)
        kept = tracker.live
        forward = tracker.peak
        # The peak of the backward begins with what the forward leaves behind.
        tracker.peak = kept
        if output.requires_grad:
            output.backward(torch.empty_like(output))
    with contextlib.suppress(AttributeError):
        for parameter in part.parameters():
            parameter.grad = None
    return Trace(kept, forward, tracker.peak, output.dtype, output.requires_grad)
