"""What a strategy asks of local training beside the loss: which factors train, and what is added to gradients.

Clients and the trunk's copies train by the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.model.devices import CPU, put
from fedsplit.updates import Task, factor_of, sure_rank


class LocalRule:
    """A task at work on one party's parameters, from the beginning of a round to its end."""

    def __init__(
        self, task: Task, start: Mapping[str, Tensor], own: Mapping[str, Tensor], device: torch.device = CPU
    ) -> None:
        """Remembers where the round began.

        Args:
            task: What the strategy asks.
            start: The adapters that training starts from, by exported name.
            own: This party's control variate c_i, by exported name; what is missing is zero.
            device: Where the parameters are; the others may be elsewhere.
        """
        self._task = task if task.control is None else replace(task, control=put(task.control, device))
        self._own = put(own, device)
        self._start = {n: t.detach().to(device, copy=True) for n, t in start.items()} if task.proximal else {}
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def trains(self, name: str) -> bool:
        """Whether a parameter trains; what is no factor of a LoRA layer always does."""
        return factor_of(name) is None or factor_of(name) in self._task.trains

    def correct(self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients that the optimiser gets.

        Args:
            gradients: Of the loss, by exported name.
            parameters: As they are now.
        """
        task, corrected = self._task, dict(gradients)
        with torch.no_grad():
            if task.control is not None:
                self._steps += 1
                for name, gradient in gradients.items():
                    self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient.clone()
                    if name in task.control:
                        corrected[name] = corrected[name] + task.control[name]
                    if name in self._own:
                        corrected[name] = corrected[name] - self._own[name]
            if task.proximal:
                for name in gradients:
                    corrected[name] = corrected[name] + task.proximal * (parameters[name] - self._start[name])
            if task.decay:
                for name, pull in self._pulls(parameters).items():
                    if name in corrected:
                        corrected[name] = corrected[name] + pull
        return corrected

    def _pulls(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of decay * ||A_tail|| * ||B_tail||, layer by layer; where a tail is zero there is none."""
        pulls = {}
        for name, a in parameters.items():
            if factor_of(name) != "A":
                continue
            other = name.replace(".lora_A.", ".lora_B.")
            b, kept = parameters[other], sure_rank(a.shape[0], self._task.tail)
            norm_a, norm_b = a[kept:].norm(), b[:, kept:].norm()
            if float(norm_a) > 0 and float(norm_b) > 0:
                pulls[name], pulls[other] = torch.zeros_like(a), torch.zeros_like(b)
                pulls[name][kept:] = self._task.decay * norm_b / norm_a * a[kept:]
                pulls[other][:, kept:] = self._task.decay * norm_a / norm_b * b[:, kept:]
        return pulls

    def control_change(self) -> dict[str, Tensor]:
        """What this party's control variate changes by: c_i+ - c_i, with c_i+ the mean of its gradients (1910.06378).

        Under plain SGD that mean is the paper's c_i - c + (theta_t - theta_i) / (K eta); it has a meaning under
        any other optimiser, too. Empty where no control variate was asked for. On the CPU.
        """
        means = {name: total / self._steps for name, total in self._sums.items()}
        changes = {name: mean - self._own[name] if name in self._own else mean for name, mean in means.items()}
        return put(changes, CPU)
