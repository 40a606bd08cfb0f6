"""The way from the last hidden states to logits, computed by the library's own code.

A model may scale or cap its logits in `forward`. So the library's `forward` runs here as it stands, with a decoder that
returns given hidden states.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


@dataclass
class _Output(MoeModelOutputWithPast):  # type: ignore[misc]  # the library has no types
    """Output of a decoder that has hidden states and nothing else."""

    def __getattr__(self, name: str) -> None:
        """Returns None for a further output of some decoder, such as the state of a state-space model."""
        if name.startswith("__"):
            raise AttributeError(name)


def _return_given(*_args: Any, inputs_embeds: Tensor, **_options: Any) -> _Output:
    """Stands for a decoder's `forward`: returns the hidden states (B, T, D) that it is given."""
    return _Output(last_hidden_state=inputs_embeds)


class LibraryHead:
    """The library's code behind the decoder of a causal language model."""

    def __init__(self, model: PreTrainedModel, decoder: str, name: str) -> None:
        """Takes over the code of a model, without its modules.

        Args:
            model: A causal language model. The call does not change it.
            decoder: Name of the decoder inside the model, dotted if nested.
            name: Name of the head inside the model.
        """
        self._name = name
        self._shell = _shallow(model)
        *outer, last = decoder.split(".")
        place, original = self._shell, model
        for name in outer:
            original = original.get_submodule(name)
            inner = _shallow(original)
            setattr(place, name, inner)
            place = inner
        given = _shallow(original.get_submodule(last))  # the code behind the decoder may read its plain attributes
        # torch calls the attribute `forward` of the object, so the class of the decoder stays as it is.
        given.forward = _return_given
        setattr(place, last, given)
        self._options = without_extras(model)  # there are no routers behind the decoder

    def __call__(self, states: Tensor, head: nn.Module) -> Tensor:
        """Computes logits (B, T, V).

        Args:
            states: Output of the last norm (B, T, D).
            head: The module that projects to the vocabulary.
        """
        setattr(self._shell, self._name, head)
        try:
            logits: Tensor = self._shell(inputs_embeds=states, **self._options).logits
        finally:
            delattr(self._shell, self._name)
        return logits


def without_extras(model: PreTrainedModel) -> dict[str, bool]:
    """Returns options of a model's `forward` for logits and nothing else: no cache, and no output of routers."""
    options = {"use_cache": False}
    if "output_router_logits" in inspect.signature(type(model).forward).parameters:
        options["output_router_logits"] = False
    return options


def _shallow(module: nn.Module) -> nn.Module:
    """Returns a module with the code and the plain attributes of another one, and none of its submodules."""
    shell = copy.copy(module)
    # A shallow copy shares these dictionaries with the original, whose submodules must stay.
    shell._modules = {}
    shell._parameters = {}
    shell._buffers = {}
    return shell


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Returns logits under a soft cap.

    Args:
        logits: Logits in any shape.
        cap: The cap; None for no cap.

    Example:
        >>> capped(torch.tensor([0.0, 1e9]), 2.0)
        tensor([0., 2.])
    """
    return logits if cap is None else torch.tanh(logits / cap) * cap
