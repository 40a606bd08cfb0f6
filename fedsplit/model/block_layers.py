"""Finds the layers inside a model's blocks that can have adapters, and the routers of experts."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsplit.model.families import STACKED, Family

_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv")
"""Matches names of modules of a block in which tokens meet."""

_ROUTERS = re.compile(r"(^|\.)(gate|router|wg)$")
"""Matches names of routers that are plain projections. Such a router gets no adapter unless asked."""

_EXPERT_PIECES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of an expert's projections in checkpoints that have the experts one by one."""


def projections_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the projections inside a block, by name."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not _ROUTERS.search(name):
            yield name, module


def _last_names(names: Iterator[str]) -> tuple[str, ...]:
    """Returns the last components of names, each once, in their order; of numbered names the last two."""
    return tuple(dict.fromkeys(re.sub(r".*\.(?=\D)", "", name) for name in names))


def targets_of(
    blocks: list[nn.Module], parameters: Mapping[str, str], called: Collection[nn.Module]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of projections inside blocks: those with an adapter by default, and the others.

    Args:
        blocks: The blocks.
        parameters: As in `Family`. The projections beside experts, such as the projections of a shared expert, have no
            adapter by default, like the experts.
        called: The projections that compute. A name of which no projection computes is left out.
    """
    names = [name for block in blocks for name, _ in projections_of(block)]
    computing = _last_names(name for block in blocks for name, module in projections_of(block) if module in called)
    outside = []
    for block in blocks:
        inside = {name for name, _ in block.named_parameters()}
        # The whole module around the experts counts, so that the projections of a shared expert are left out, too.
        mixtures = tuple(f"{path.partition('.')[0]}." for path in parameters.values() if path in inside)
        outside += [name for name, _ in projections_of(block) if not name.startswith(mixtures)]
    if any(name.endswith("A_log") for block in blocks for name, _ in block.named_parameters()):  # a state-space model
        names = [name for name in names if name.rpartition(".")[2] != "out_proj"]  # PEFT refuses it, as fused code
    if parameters:  # PEFT takes these names for pieces of the experts, wherever they are
        names = [name for name in names if name.rpartition(".")[2] not in _EXPERT_PIECES]
    beside = [name for name in _last_names(iter(names)) if name in computing]
    usual = tuple(name for name in _last_names(iter(outside)) if name in beside)
    return usual, tuple(name for name in beside if name not in usual and name not in parameters)


def uncalled_of(blocks: list[nn.Module], called: Collection[nn.Module]) -> tuple[str, ...]:
    """Returns the names of projections inside blocks that never compute; see `Family.uncalled`.

    Args:
        blocks: The blocks.
        called: The projections that compute.
    """
    names = _last_names(name for block in blocks for name, _ in projections_of(block))
    computing = _last_names(name for block in blocks for name, module in projections_of(block) if module in called)
    return tuple(name for name in names if name not in computing)


def is_uncalled(name: str, family: Family) -> bool:
    """Returns whether a projection never computes by itself.

    Args:
        name: Name of the projection, with the number of its block or without.
        family: Record of the model's type.
    """
    return any(name == last or name.endswith(f".{last}") for last in family.uncalled)


def norms_of(blocks: list[nn.Module]) -> tuple[str, ...]:
    """Returns the names of all norms with weights inside blocks."""

    def found() -> Iterator[str]:
        for block in blocks:
            for name, module in block.named_modules():
                weight = getattr(module, "weight", None)
                if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
                    yield name

    return _last_names(found())


def narrows_of(blocks: list[nn.Module], width: int) -> tuple[str, ...]:
    """Returns the names of the MLP projections back to the hidden size, as short as tells them apart."""
    names = dict.fromkeys(name for block in blocks for name, _ in projections_of(block))
    found = []
    for block in blocks:
        for name, module in projections_of(block):
            weight = module.get_parameter("weight")
            rows = weight.shape[1 if isinstance(module, Conv1D) else 0]
            if rows != width or any(_ATTENTION.search(component) for component in name.split(".")):
                continue
            # GPT-2's attention and MLP both have a `c_proj`. In such a model the MLP's name keeps the path before the
            # last component, or an adapter would go to both.
            last = name.rpartition(".")[2]
            namesakes = [other for other in names if other.rpartition(".")[2] == last]
            is_shared = any(_ATTENTION.search(other) for other in namesakes)
            found.append(name if is_shared else last)
    return tuple(dict.fromkeys(found))


def is_balanced(model: PreTrainedModel) -> bool:
    """Returns whether the library has a loss that balances the model's experts."""
    code = sys.modules[type(model).__module__]
    return hasattr(code, "load_balancing_loss_func") and hasattr(model.config, "router_aux_loss_coef")


def router_of(model: PreTrainedModel, blocks: list[nn.Module]) -> str | None:
    """Returns the name of the router inside a block, if the library balances experts by the router's output.

    Args:
        model: The miniature.
        blocks: Its blocks.
    """
    recorders = getattr(model, "_can_record_outputs", None) or {}
    # `fedsplit.model.routers` reads the first output of a router, and the two sizes below from the configuration. A
    # model that lacks any of these is not balanced here.
    recorder = recorders.get("router_logits")
    router_class = getattr(recorder, "target_class", None)
    if not is_balanced(model) or router_class is None or getattr(recorder, "index", None) != 0:
        return None
    if not all(hasattr(model.config, key) for key in ("num_experts", "num_experts_per_tok")):
        return None
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, router_class):
                return name
    return None


def parameters_of(blocks: list[nn.Module], router: str | None) -> dict[str, str]:
    """Returns the parameters outside of projections that can have adapters; see `Family.parameters`."""
    stacked: dict[str, str] = {}
    routers: dict[str, str] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            outer, _, last = name.rpartition(".")
            if last in STACKED and outer.endswith("experts") and parameter.ndim == 3:
                stacked.setdefault(last, name)
            if router and name == f"{router}.weight" and type(block.get_submodule(router)) is not nn.Linear:
                routers.setdefault(router.rpartition(".")[2], name)
    return stacked | routers
