"""The base model within adapted parts: adapters are turned off for a while.

Adapters in the layers are passed by; virtual tokens and prefixes are left out. A head that trains all its weights has
no base weights left, and an adapter that starts from a decomposition of the base has changed them:
`fedsplit.client.measures` refuses both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from fedsplit.model.parts import PARTS, Part


@contextlib.contextmanager
def without_adapter(part: Part) -> Iterator[None]:
    """Turns the adapter of a part off inside the context.

    Args:
        part: The part. No other thread may compute with the part meanwhile.

    Example:
        >>> from fedsplit.adaptation import lora
        >>> from fedsplit.model.split import load_parts
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> from fedsplit.settings.sections import LoraSettings
        >>> bare, bottom = [load_parts(BUNDLED_MODEL, (1, 5), ["bottom"])[0].eval() for _ in range(2)]
        >>> lora.add(bottom, LoraSettings(), seed=0)
        >>> for parameter in lora.parameters(bottom).values():
        ...     _ = torch.nn.init.ones_(parameter)
        >>> ids = torch.tensor([[3, 4]])
        >>> with without_adapter(bottom):
        ...     torch.equal(bottom(ids), bare(ids))
        True
    """
    layers = [module for module in part.modules() if isinstance(module, BaseTunerLayer)]
    states = [layer._disable_adapters for layer in layers]
    kind = part.__class__
    virtual = part.virtual
    ahead = part.ahead
    try:
        # The attribute and not PEFT's `enable_adapters`, which would also stop the adapters from training.
        for layer in layers:
            layer._disable_adapters = True
        part.__class__ = PARTS[part.kind]  # virtual tokens and prefixes are classes of their own
        part.virtual = 0
        part.ahead = 0
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer._disable_adapters = state
        part.__class__ = kind
        part.virtual = virtual
        part.ahead = ahead


@contextlib.contextmanager
def base_only(part: Part) -> Iterator[None]:
    """Lets a part compute as in the base model inside the context: without adapter, dropout and gradients.

    Args:
        part: The part.
    """
    was_training = part.training
    try:
        part.eval()
        with without_adapter(part), torch.no_grad():
            yield
    finally:
        part.train(was_training)
