"""Further arguments of objectives and metrics, beside logits and labels. A function asks for them by its signature.

A party of a split has its own logits, labels and mask, and can send its tokens through the base model. Nothing else of
the model is in one place. So a function that needs anything else is refused by name before a run begins.

Shapes: B sequences of T predicted positions, V tokens in the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import SettingError

MASK = "mask"
"""Argument (B, T): False where the label stands on padding. Aligned with the labels."""

REFERENCE = "reference"
"""Argument (B, T, V): logits of the base model, without the adapters of all parts, without dropout and gradient."""

FURTHER = (MASK, REFERENCE)
"""Names of the further arguments."""

_STATES = "hidden states of other parts stay with their parties"
_WHOLE = "no party has the whole model"

_WITHHELD: Mapping[str, str] = {
    **dict.fromkeys(("model", "ref_model", "reference_model", "teacher", "base_model", "parameters"), _WHOLE),
    **dict.fromkeys(("inputs", "outputs", "batch", "trainer"), _WHOLE),
    **dict.fromkeys(("hidden", "hidden_states", "hidden_states_of_trunk", "attentions", "past_key_values"), _STATES),
    **dict.fromkeys(("input_embeds", "inputs_embeds", "embeddings", "router_logits"), _STATES),
    **dict.fromkeys(("bottom", "trunk", "top", "adapter", "adapters", "gradients"), "parts and adapters stay apart"),
}
"""Reason why a split cannot give an argument, by the name of the argument."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_COLLECTED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def further_of(function: Callable[..., Any], setting: str, spec: str) -> frozenset[str]:
    """Returns the names of the further arguments that a function of logits and labels asks for.

    The first two positional parameters are logits and labels, by whatever name. A further parameter with a default that
    a split cannot give keeps its default.

    Args:
        function: The function, or an object with a method `__call__`.
        setting: Setting that names the function, for the message.
        spec: Name of the function in the setting, for the message.

    Raises:
        SettingError: The function needs something that a split cannot give.

    Example:
        >>> sorted(further_of(lambda logits, labels, reference: 0, "objective", "mine.py:f"))
        ['reference']
        >>> further_of(lambda logits, labels, attentions: 0, "objective", "mine.py:f")
        Traceback (most recent call last):
        fedsplit.errors.SettingError: objective: mine.py:f, which asks for attentions (hidden states of other parts \
stay with their parties), is not possible; allowed: a function of logits, labels, mask and reference
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # a function in C may not tell its parameters
        return frozenset()
    first = [parameter for parameter in parameters if parameter.kind in _POSITIONAL][:2]
    for parameter in parameters:
        name = parameter.name
        if parameter in first:
            is_refused = name in _WITHHELD
        else:
            is_needed = parameter.default is parameter.empty and parameter.kind not in _COLLECTED
            is_refused = is_needed and name not in FURTHER
        if is_refused:
            raise _refused(name, setting, spec)
    return frozenset(parameter.name for parameter in parameters if parameter not in first) & {*FURTHER}


def invented(
    names: Collection[str],
    logits: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Returns further arguments for a trial.

    Args:
        names: Names of the arguments.
        logits: Logits of the trial.
        labels: Labels of the trial.
        generator: Generator of the base model's logits.

    Example:
        >>> further = invented(["mask"], torch.zeros(1, 2, 3), torch.tensor([[1, -100]]), torch.Generator())
        >>> further["mask"].tolist()
        [[True, False]]
    """
    arguments = {
        MASK: labels >= 0,
        REFERENCE: torch.randn(logits.shape, generator=generator),
    }
    return {name: argument for name, argument in arguments.items() if name in names}


def _refused(name: str, setting: str, spec: str) -> SettingError:
    """Returns the error for a function that needs an argument which a split cannot give."""
    reason = _WITHHELD.get(name)
    why = f" ({reason})" if reason else ""
    allowed = f"a function of logits, labels, {' and '.join(FURTHER)}"
    return SettingError(setting, f"{spec}, which asks for {name}{why},", allowed)
