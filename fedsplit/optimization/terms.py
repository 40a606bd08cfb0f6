"""Terms of a strategy for the gradients of a party: control variates, a proximal term, decay of a rank's tail.

Clients and the trunk's copies train by the same stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.model.devices import CPU, put
from fedsplit.stages import Gradients, GradientStage, LocalStep, Outcome, RoundStart, Stages
from fedsplit.updates import Task, factor_of, sure_rank


def terms_of(
    task: Task,
    control: Mapping[str, Tensor] | None = None,
    device: torch.device = CPU,
    own: GradientStage | None = None,
) -> Stages:
    """Returns the stages for a task, in the order of computation.

    Args:
        task: Task of the strategy for a client.
        control: Control variate c_i of the party, by exported name. A missing tensor is zero.
        device: Device of the party's parameters.
        own: Stage of the strategy, to run last.

    Example:
        >>> terms = terms_of(Task(proximal=0.5))
        >>> terms.begin(RoundStart({"w": torch.zeros(1)}))
        >>> terms({"w": torch.tensor([1.0])}, LocalStep({"w": torch.tensor([4.0])}))
        {'w': tensor([3.])}
    """
    stages: list[GradientStage] = []
    if task.control is not None:
        of_server = put(task.control, device)
        of_client = put(control or {}, device)
        stages.append(ControlVariates(of_server, of_client))
    if task.proximal:
        stages.append(Proximal(task.proximal))
    if task.decay:
        stages.append(TailDecay(task.tail, task.decay))
    if own is not None:
        stages.append(own)
    return Stages(*stages)


def moved(control: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a party's control variate after a round.

    Args:
        control: Control variate before the round. A missing tensor is zero.
        changes: Change of the control variate in the round.

    Example:
        >>> moved({"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0]), "b": torch.tensor([4.0])})
        {'a': tensor([3.]), 'b': tensor([4.])}
    """
    after = dict(changes)
    for name in changes.keys() & control.keys():
        after[name] = control[name] + changes[name]
    return after


class ControlVariates(GradientStage):
    """SCAFFOLD's correction (1910.06378): g - c_i + c. The next c_i is the mean of the client's raw gradients g.

    Example:
        >>> stage = ControlVariates({"w": torch.tensor([0.5])}, {"w": torch.tensor([2.0])})
        >>> stage({"w": torch.tensor([3.0])}, LocalStep({}))
        {'w': tensor([1.5000])}
        >>> stage.end({}).sent  # from c_i = 2 to the mean gradient 3
        {'w': tensor([1.])}
    """

    def __init__(self, server: Mapping[str, Tensor], client: Mapping[str, Tensor]) -> None:
        """Takes both control variates.

        Args:
            server: Control variate c of the server, by exported name.
            client: Control variate c_i of the client. A missing tensor is zero.
        """
        self._server = server
        self._client = client
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns g - c_i + c for each gradient g, and adds g to the sum."""
        self._steps += 1
        # A new dictionary, since a stage must not change the gradients of its caller.
        corrected = dict(gradients)
        for name, gradient in gradients.items():
            if name in self._sums:
                self._sums[name] = self._sums[name] + gradient
            else:
                self._sums[name] = gradient.clone()  # the optimiser's step may reuse the memory of a gradient
            if name in self._server:
                corrected[name] = corrected[name] + self._server[name]
            if name in self._client:
                corrected[name] = corrected[name] - self._client[name]
        return corrected

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Sends the change c_i+ - c_i, with c_i+ the mean of the raw gradients.

        Under plain SGD, the mean is the paper's c_i - c + (theta_t - theta_i) / (K eta). The mean has a meaning under
        every optimiser, the paper's formula under plain SGD only.
        """
        changes = {}
        for name, total in self._sums.items():
            mean = total / self._steps
            changes[name] = mean - self._client[name] if name in self._client else mean
        return Outcome(sent=changes)


class Proximal(GradientStage):
    """FedProx's pull (1812.06127): the gradient of mu / 2 * ||theta - theta_t||^2."""

    def __init__(self, mu: float) -> None:
        """Takes mu, the strength of the pull."""
        self._mu = mu

    def begin(self, start: RoundStart) -> None:
        """Remembers theta_t, the adapters at the start of the round."""
        # Copies: the tensors may be the parameters themselves, which the optimiser changes in place.
        self._start = {name: tensor.detach().clone() for name, tensor in start.adapters.items()}

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Adds mu * (theta - theta_t)."""
        pulled = {}
        for name, gradient in gradients.items():
            distance = step.parameters[name] - self._start[name]
            pulled[name] = gradient + self._mu * distance
        return pulled


class TailDecay(GradientStage):
    """HetLoRA's decay (2401.06432): the gradient of decay * ||A_tail|| * ||B_tail||, layer by layer."""

    def __init__(self, tail: float, decay: float) -> None:
        """Takes the settings of the decay.

        Args:
            tail: Share of the rank before the tail.
            decay: Strength of the decay.
        """
        self._tail = tail
        self._decay = decay

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Adds the pull on both factors of each layer. A tail of zeros is not pulled."""
        corrected = dict(gradients)
        for name, pull in self._pulls(step.parameters).items():
            if name in corrected:
                corrected[name] = corrected[name] + pull
        return corrected

    def _pulls(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the gradient of the decay, for the factors of layers with a tail."""
        pulls = {}
        for name_a, a in parameters.items():
            if factor_of(name_a) != "A":
                continue
            name_b = name_a.replace(".lora_A.", ".lora_B.")
            b = parameters[name_b]
            sure = sure_rank(a.shape[0], self._tail)
            norm_a = a[sure:].norm()
            norm_b = b[:, sure:].norm()
            if not (float(norm_a) > 0 and float(norm_b) > 0):  # a norm has no gradient at zero
                continue
            pulls[name_a] = torch.zeros_like(a)
            pulls[name_b] = torch.zeros_like(b)
            pulls[name_a][sure:] = self._decay * norm_b / norm_a * a[sure:]
            pulls[name_b][:, sure:] = self._decay * norm_a / norm_b * b[:, sure:]
        return pulls
