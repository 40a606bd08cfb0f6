"""Folding: adds matrices to the base weights of a part for good, and takes them back to the bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedsplit.lowrank import LowRank
from fedsplit.model.head import HEAD
from fedsplit.model.parts import Part


@torch.no_grad()
def fold(part: Part, changes: Mapping[str, LowRank]) -> None:
    """Adds matrices to the frozen base weights of a part's adapted layers.

    Args:
        part: The part.
        changes: Matrices (out, in) by layer of the unsplit model. Layers of further parts are ignored.

    Raises:
        ValueError: The weights of a layer are quantised, and would have to be quantised again.
    """
    for name, module in part.named_modules():
        layer = part.unsplit_name(name)
        change = changes.get(layer)
        if not isinstance(module, LoraLayer) or change is None:
            continue
        if name == HEAD:
            # A head may be tied to the embedding, which must not change: only the head gets the matrix.
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.clone(), requires_grad=False)
        weight = module.base_layer.weight
        if not weight.is_floating_point():
            raise ValueError(f"nothing can be folded into {layer}, whose weights are quantised")
        up = change.up.to(weight)
        down = change.down.to(weight)
        # `addmm_` adds the product in place, without a matrix of the weight's size beside it. Conv1D stores (in, out).
        if module.fan_in_fan_out:
            weight.addmm_(down.T, up.T)
        else:
            weight.addmm_(up, down)


def base_weights(part: Part, layers: Collection[str]) -> dict[str, Tensor]:
    """Copies the frozen weights below a part's adapters.

    Args:
        part: The part.
        layers: Layers of the unsplit model. Layers of further parts are left out.

    Returns:
        Weights by layer, as the library stores them: (out, in), or (in, out) for GPT-2's Conv1D.
    """
    weights = {}
    for name, module in part.named_modules():
        layer = part.unsplit_name(name)
        if isinstance(module, LoraLayer) and layer in layers:
            weights[layer] = module.base_layer.weight.detach().clone()
    return weights


@torch.no_grad()
def put_back(part: Part, weights: Mapping[str, Tensor]) -> None:
    """Writes weights from `base_weights` back to their layers.

    Copies are exact. A matrix that is added and subtracted again would leave rounding errors.
    """
    for name, module in part.named_modules():
        layer = part.unsplit_name(name)
        if isinstance(module, LoraLayer) and layer in weights:
            module.base_layer.weight.copy_(weights[layer])
