"""AdaLoRA (2303.10512) at work on one part: after every step ranks are dealt out anew, by PEFT's own code.

A layer's change is P Λ Q, which PEFT names lora_B, lora_E and lora_A. What matters least loses its value in Λ, which
becomes zero; the gradient may bring it back before the next allocation. `fedsplit.adaptation.rank_budget` says how far
a part's budget is that of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, AdaLoraModel
from peft.tuners.adalora import RankAllocator
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from fedsplit.adaptation.injection import ADAPTER, make_config
from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.config import Config
from fedsplit.model.families import Family
from fedsplit.model.sources import about
from fedsplit.model.unsplit import blank

_SINGULAR, _BASES = ".lora_E", (".lora_A", ".lora_B")
"""How the exported names of Λ, and of Q and P, end."""

_MEAN, _UNCERTAINTY, _MASK = "#importance", "#uncertainty", "#kept"
"""What is remembered of a parameter, after its name; no optimiser's moments are called so."""


def adapted_layers(config: Config, family: Family) -> int:
    """How many layers of the whole model a run's adapters sit on."""
    adapted = make_config(config.lora, family, seed=config.seed)
    names = (name for name, _ in blank(about(config)).named_modules())
    return sum(bool(check_target_module_exists(adapted, name)) for name in names)


def _distance(name: str, factor: Tensor) -> Tensor:
    """How far the rows of Q (r, in), or the columns of P (out, r), are from orthonormal: a Frobenius norm."""
    gram = factor @ factor.T if name.endswith(".lora_A") else factor.T @ factor
    return torch.linalg.vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def regularisation(tensors: Mapping[str, Tensor], budget: RankBudget, share: float = 1.0) -> dict[str, Tensor]:
    """The gradient of what PEFT adds to the loss so that P and Q stay orthogonal, by a part's own factors.

    PEFT takes a mean over all factors that there are. Here each counts as it does in the whole model's mean, so that
    the sum over the parts is the whole's, and so is each factor's gradient.

    Args:
        tensors: The part's adapter, by exported name.
        budget: The part's.
        share: What of it is wanted, where a step comes in several parts.

    Returns:
        By name, for P and Q; empty where it counts nothing.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name.endswith(_BASES)}
    if not leaves or not budget.orth_reg_weight:
        return {}
    with torch.enable_grad():
        total = torch.stack([_distance(name, leaf) for name, leaf in leaves.items()]).sum()
        loss = budget.orth_reg_weight * share * (total / (2 * budget.layers))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


class _Named:
    """Parameters under the names that PEFT looks for, as a module tells them."""

    def __init__(self, own: Mapping[str, nn.Parameter]) -> None:
        self._own = {f"{name}.{ADAPTER}": parameter for name, parameter in own.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._own.items()


class RankAllocation:
    """The allocator of one part's ranks, and what it remembers."""

    def __init__(
        self, adapter: Mapping[str, nn.Parameter], budget: RankBudget, kept: Mapping[str, Tensor] | None = None
    ) -> None:
        """Begins, or goes on from what `moments` told.

        Args:
            adapter: The part's adapter by exported name, as it is before the step to come; what is in it beside P, Λ
                and Q is left alone.
            budget: The part's.
            kept: What is remembered; what belongs to others is passed over. Nothing where it begins anew.
        """
        self._own = {name: p for name, p in adapter.items() if name.endswith((_SINGULAR, *_BASES))}
        self._budget, self._model = budget, _Named(self._own)
        self._config = AdaLoraConfig(**budget.fields)
        self._allocator = RankAllocator(self._model, self._config, ADAPTER)
        self._given = {name: p.detach() != 0 for name, p in self._own.items() if name.endswith(_SINGULAR)}
        self._restore(kept or {})

    def allocate(self, gradients: Mapping[str, Tensor], position: int) -> None:
        """Takes a step of the optimiser into account, which has just been made, and masks Λ where it is time.

        The allocator of a part that no gradient reaches, as that of a bottom under `forward-only`, does nothing.

        Args:
            gradients: Those that the optimiser got, by exported name.
            position: The number of the step, as `RankBudget.position` counts.
        """
        if not gradients.keys() >= self._own.keys():
            return
        for name, parameter in self._own.items():
            parameter.grad = gradients[name]
        whole = SimpleNamespace(
            peft_config={ADAPTER: self._config},
            trainable_adapter_name=ADAPTER,
            rankallocator=self._allocator,
            model=self._model,
        )
        AdaLoraModel.update_and_allocate(whole, self._due(position))
        for parameter in self._own.values():
            parameter.grad = None

    def _due(self, position: int) -> int:
        """The step that PEFT is told, with all in place that it then needs.

        It reckons with every step being made, by one allocator. Here the last allocation may have been missed, which is
        then made by what is remembered; or all may have been forgotten between two rounds. Then the last allocation is
        made by this step's gradient, and after it whatever came as zero stays so. (Where all came as zero, nothing has
        been dealt out yet.)
        """
        last = self._budget.last
        if position < last or self._allocator.exp_avg_ipt:
            return min(position, last)
        if self._config.rank_pattern is None:
            if position == last or not any(bool(mask.any()) for mask in self._given.values()):
                self._allocator.update_ipt(self._model)
                return last
            self._config.rank_pattern = {f"{n}.{ADAPTER}": mask.view(-1).tolist() for n, mask in self._given.items()}
        return last + 1

    def moments(self) -> dict[str, Tensor]:
        """What it remembers, on the CPU: smoothed importance, its uncertainty, and which ranks were left."""
        found: dict[str, Tensor] = {}
        for what, known in ((_MEAN, self._allocator.exp_avg_ipt), (_UNCERTAINTY, self._allocator.exp_avg_unc)):
            found |= {f"{name.removesuffix(f'.{ADAPTER}')}{what}": t.to("cpu", copy=True) for name, t in known.items()}
        for name, mask in (self._config.rank_pattern or {}).items():
            found[f"{name.removesuffix(f'.{ADAPTER}')}{_MASK}"] = torch.tensor(mask)
        return found

    def position(self, round: int, step: int) -> int:
        """As `RankBudget.position`."""
        return self._budget.position(round, step)

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        allocator, masks = self._allocator, {}
        for name, parameter in self._own.items():
            local = f"{name}.{ADAPTER}"
            if (mean := kept.get(f"{name}{_MEAN}")) is not None:
                allocator.ipt[local] = torch.zeros_like(parameter)
                allocator.exp_avg_ipt[local] = mean.to(parameter.device, copy=True)
                allocator.exp_avg_unc[local] = kept[f"{name}{_UNCERTAINTY}"].to(parameter.device, copy=True)
            if (mask := kept.get(f"{name}{_MASK}")) is not None:
                masks[local] = mask.tolist()
        self._config.rank_pattern = masks or None


def begin(
    adapter: Mapping[str, nn.Parameter], budget: RankBudget | None, kept: Mapping[str, Tensor] | None = None
) -> RankAllocation | None:
    """The allocator of a part, as `RankAllocation` has it; None where ranks are not dealt out, or there are none."""
    dealt = budget is not None and any(name.endswith(_SINGULAR) for name in adapter)
    return RankAllocation(adapter, budget, kept) if dealt and budget is not None else None
