"""Rank allocation of one part under AdaLoRA (2303.10512), by PEFT's own code.

The change of a layer is P Λ Q. PEFT names the factors lora_B, lora_E and lora_A. An allocation sets the least
important values of Λ to zero. Before the next allocation, gradients may change a zero again.
`fedsplit.adaptation.rank_budget` explains how budgets of parts differ from AdaLoRA on the unsplit model.
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
from fedsplit.model.families import Family
from fedsplit.model.sources import config_folder
from fedsplit.model.unsplit import empty_model
from fedsplit.settings.config import Config

_SINGULAR = ".lora_E"
"""End of the exported name of Λ."""

_BASES = (".lora_A", ".lora_B")
"""Ends of the exported names of Q and P."""

# Suffixes of a parameter's name in the saved state. No name of an optimiser moment ends with one.
_MEAN = "#importance"
_UNCERTAINTY = "#uncertainty"
_MASK = "#kept"


def adapted_layers(config: Config, family: Family) -> int:
    """Returns the number of adapted layers of the unsplit model."""
    adapted = make_config(config.lora, family, seed=config.seed)
    model = empty_model(config_folder(config.model, weights=False))
    return sum(bool(check_target_module_exists(adapted, name)) for name, _ in model.named_modules())


def _distance(name: str, factor: Tensor) -> Tensor:
    """Returns the distance of the rows of Q (r, in), or of the columns of P (out, r), from orthonormal vectors.

    The distance is the Frobenius norm of the Gram matrix minus the identity.
    """
    gram = factor @ factor.T if name.endswith(".lora_A") else factor.T @ factor
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.vector_norm(gram - identity)


def regularisation(tensors: Mapping[str, Tensor], budget: RankBudget, share: float = 1.0) -> dict[str, Tensor]:
    """Computes the gradient of the regularisation that keeps P and Q orthogonal, by the factors of a part.

    PEFT's regularisation is a mean over all factors of a model. Each factor keeps the weight in the mean of the unsplit
    model, so that the gradient equals the gradient in the unsplit model.

    Args:
        tensors: The part's adapter, by exported name.
        budget: Rank budget of the part.
        share: Fraction of the gradient to return, for a step in micro-batches.

    Returns:
        Gradients of P and Q by name; empty if the regularisation has no weight.
    """
    factors = {}
    for name, tensor in tensors.items():
        if name.endswith(_BASES):
            factors[name] = tensor.detach().requires_grad_()
    if not factors or not budget.orth_reg_weight:
        return {}
    with torch.enable_grad():  # stages run without autograd
        distances = [_distance(name, factor) for name, factor in factors.items()]
        mean = torch.stack(distances).sum() / (2 * budget.layers)  # two factors a layer
        loss = budget.orth_reg_weight * share * mean
    gradients = torch.autograd.grad(loss, list(factors.values()))
    return dict(zip(factors, gradients, strict=True))


class _NamedParameters:
    """Stands for a model in PEFT's allocator. The allocator reads named parameters only."""

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        self._factors = {f"{name}.{ADAPTER}": parameter for name, parameter in factors.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._factors.items()


class RankAllocation:
    """Rank allocator of one part, with state."""

    def __init__(
        self, adapter: Mapping[str, nn.Parameter], budget: RankBudget, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Starts anew, or from a saved state.

        Args:
            adapter: The part's adapter by exported name, before the next step. Only P, Λ and Q are used.
            budget: Rank budget of the part.
            state: Result of `moments`; None to start anew. Tensors of optimiser moments are ignored.
        """
        self._factors: dict[str, nn.Parameter] = {}
        self._nonzero: dict[str, Tensor] = {}
        for name, parameter in adapter.items():
            if name.endswith((_SINGULAR, *_BASES)):
                self._factors[name] = parameter
            if name.endswith(_SINGULAR):
                self._nonzero[name] = parameter.detach() != 0
        self._budget = budget
        self._model = _NamedParameters(self._factors)
        self._config = AdaLoraConfig(**budget.fields)
        self._allocator = RankAllocator(self._model, self._config, ADAPTER)
        self._restore(state or {})

    def allocate(self, gradients: Mapping[str, Tensor], position: int) -> None:
        """Updates the importance of ranks after a step of the optimiser, and masks Λ if an allocation is due.

        Does nothing for a part without gradients, such as the bottom under the schedule `forward-only`.

        Args:
            gradients: Gradients of the step, by exported name.
            position: Number of the step, from `RankBudget.position`.
        """
        if not gradients.keys() >= self._factors.keys():
            return
        for name, parameter in self._factors.items():
            parameter.grad = gradients[name]  # PEFT reads `grad`, which the optimiser's step has dropped
        # PEFT's method runs on this stand-in for its model.
        model = SimpleNamespace(
            peft_config={ADAPTER: self._config},
            trainable_adapter_name=ADAPTER,
            rankallocator=self._allocator,
            model=self._model,
        )
        AdaLoraModel.update_and_allocate(model, self._peft_step(position))
        for parameter in self._factors.values():
            parameter.grad = None

    def _peft_step(self, position: int) -> int:
        """Returns the step number to pass to PEFT, and prepares the state that PEFT needs at this step.

        PEFT expects one allocator to see every step. A part may miss steps, or lose its state:

        - If the last allocation was missed, it is made now, from the saved importance.
        - If all state was lost between two rounds, the last allocation is made from the gradient of this step. After
          the last allocation, values of Λ that are zero stay zero. (If all are zero, nothing was allocated yet.)
        """
        last = self._budget.last
        if position < last or self._allocator.exp_avg_ipt:
            return min(position, last)
        if self._config.rank_pattern is None:
            nothing_allocated = not any(bool(mask.any()) for mask in self._nonzero.values())
            if position == last or nothing_allocated:
                self._allocator.update_ipt(self._model)
                return last
            self._config.rank_pattern = {}
            for name, mask in self._nonzero.items():
                self._config.rank_pattern[f"{name}.{ADAPTER}"] = mask.view(-1).tolist()
        return last + 1

    def moments(self) -> dict[str, Tensor]:
        """Returns the state on the CPU: importance and uncertainty, both smoothed, and the mask of remaining ranks."""
        state: dict[str, Tensor] = {}
        for local, average in self._allocator.exp_avg_ipt.items():
            state[f"{_exported(local)}{_MEAN}"] = average.to("cpu", copy=True)
        for local, average in self._allocator.exp_avg_unc.items():
            state[f"{_exported(local)}{_UNCERTAINTY}"] = average.to("cpu", copy=True)
        for local, mask in (self._config.rank_pattern or {}).items():
            state[f"{_exported(local)}{_MASK}"] = torch.tensor(mask)
        return state

    def position(self, round: int, step: int) -> int:
        """Returns the number of a step; see `RankBudget.position`."""
        return self._budget.position(round, step)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        allocator = self._allocator
        masks = {}
        for name, parameter in self._factors.items():
            local = f"{name}.{ADAPTER}"
            mean = state.get(f"{name}{_MEAN}")
            if mean is not None:
                # PEFT begins the averages anew for a parameter without an entry here.
                allocator.ipt[local] = torch.zeros_like(parameter)
                allocator.exp_avg_ipt[local] = mean.to(parameter.device, copy=True)
                allocator.exp_avg_unc[local] = state[f"{name}{_UNCERTAINTY}"].to(parameter.device, copy=True)
            mask = state.get(f"{name}{_MASK}")
            if mask is not None:
                masks[local] = mask.tolist()
        self._config.rank_pattern = masks or None


def _exported(local: str) -> str:
    """Returns the exported name of a parameter, given its name in PEFT's allocator."""
    return local.removesuffix(f".{ADAPTER}")


def begin(
    adapter: Mapping[str, nn.Parameter], budget: RankBudget | None, state: Mapping[str, Tensor] | None = None
) -> RankAllocation | None:
    """Returns the `RankAllocation` of a part; None if the part has no budget, or no ranks to allocate."""
    if budget is None or not any(name.endswith(_SINGULAR) for name in adapter):
        return None
    return RankAllocation(adapter, budget, state)
