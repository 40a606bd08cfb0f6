"""Changes to a decoder of the library that make it a part: modules that pass their input on, and shortened lists.

Shapes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsplit.model.miniature import by_block, is_of_numbers, is_per_block

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_COMPUTED = ("layers_block_type", "layer_types", "layers_num_experts")
"""Names of the kinds of blocks that configurations compute."""


class Passing(nn.Module):
    """Stands for a module through which hidden states pass in another part. Here they pass unchanged."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Has a weight without values, since some decoders read its type."""
        super().__init__()
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the hidden states."""
        return hidden


class NoPositions(nn.Module):
    """Stands for learned positions in trunk and top. The hidden states contain the positions already."""

    def forward(self, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns 0, which the decoder adds."""
        return torch.zeros((), device=positions.device)


def compute_first(module: nn.Module, decoder: nn.Module) -> None:
    """Lets a module of a bottom compute once in each forward of the decoder: before the first block.

    Some decoders use one norm both before the first block and after the last. The second place belongs to the top.

    Args:
        module: The module. It keeps its name and its weights.
        decoder: The decoder that has the module.
    """
    calls = 0

    def begin(*_: Any) -> None:
        nonlocal calls
        calls = 0

    def choose(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output if calls == 1 else inputs[0]

    decoder.register_forward_pre_hook(begin)
    module.register_forward_hook(choose)


_ENTERING: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("entering", default=None)
"""Hidden states that enter the first block of a trunk or top, in place of what the library's decoder made of them."""


@contextlib.contextmanager
def entering(hidden: Tensor) -> Iterator[None]:
    """Has hidden states (B, T, D) enter the first block unchanged, inside the context."""
    token = _ENTERING.set(hidden)
    try:
        yield
    finally:
        _ENTERING.reset(token)


def enter(_block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Replaces the input of a first block, as a hook.

    The library's decoder may scale or normalise its input. The bottom has done so already.
    """
    hidden = _ENTERING.get()
    if hidden is None:
        return None
    if inputs:
        return (hidden, *inputs[1:]), options
    return inputs, {**options, "hidden_states": hidden}


def cut_lists(owner: Any, blocks: range, depth: int) -> None:
    """Cuts the lists with an entry for each block down to a part's blocks, in place.

    Args:
        owner: The configuration, or the decoder.
        blocks: Numbers of the part's blocks.
        depth: Number of blocks of the unsplit model.
    """
    if not blocks:  # without blocks, masks are made as for any kind of block
        return
    for key, value in list(vars(owner).items()):
        if is_of_numbers(key, value, depth):
            setattr(owner, key, [number - blocks.start for number in value if number in blocks])
        elif is_per_block(key, value, depth):
            setattr(owner, key, value[blocks.start : blocks.stop])


def fix_kinds(config: PretrainedConfig, blocks: range, depth: int) -> None:
    """Keeps the kinds of a part's blocks that the configuration computes from their numbers, in place.

    Such a configuration has a period, and would begin to count at the part's first block.

    Args:
        config: The configuration. The call gives it a class of its own.
        blocks: Numbers of the part's blocks.
        depth: Number of blocks of the unsplit model.
    """
    fixed: dict[str, Any] = {}
    for name in _COMPUTED:
        if blocks and isinstance(getattr(type(config), name, None), property):
            kinds = getattr(config, name)
            if is_per_block(name, kinds, depth):
                fixed[name] = list(kinds[blocks.start : blocks.stop])
    if fixed:
        # A property cannot be overwritten on an object. A subclass for this one object leaves the library's class,
        # and with it the configurations of other parts, unchanged.
        config.__class__ = type(type(config).__name__, (type(config),), fixed)


def put_first(config: PretrainedConfig, blocks: range, depth: int) -> None:
    """Puts a part's blocks first in a configuration in which blocks have sizes of their own, in place.

    The decoder asks such a configuration for the sizes of every kind of block, so that no block can be left out.

    Args:
        config: The configuration.
        blocks: Numbers of the part's blocks.
        depth: Number of blocks of the unsplit model.
    """
    order = [*blocks, *(block for block in range(depth) if block not in blocks)]
    owns = by_block(config.to_dict()["per_layer_config"])
    for key, value in list(vars(config).items()):
        if is_per_block(key, value, depth):
            setattr(config, key, [value[block] for block in order])
    config.per_layer_config = {place: owns[block] for place, block in enumerate(order) if block in owns}
