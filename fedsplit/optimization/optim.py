"""The optimiser that clients and trunk train their adapters with, and what it remembers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsplit.errors import SettingError, first_line
from fedsplit.settings.choices import OPTIMIZERS
from fedsplit.settings.sections import TrainSettings

_STATES_OF_8_BIT = 4096
"""From how many values on bitsandbytes keeps a tensor's moments in 8 bits; those of smaller ones stay in 32."""


def make_optimizer(parameters: Iterable[Tensor], settings: TrainSettings) -> torch.optim.Optimizer | None:
    """AdamW (1711.05101), SGD, or AdamW with moments in 8 bits (2110.02861).

    Args:
        parameters: What is trained.
        settings: Which one, learning rate, weight decay, and what the optimiser has of its own.

    Returns:
        The optimiser; None where there is nothing to train, as for a bottom without blocks.
    """
    trained = list(parameters)
    if not trained:
        return None
    lr, decay, betas = settings.lr, settings.weight_decay, (settings.beta1, settings.beta2)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=lr, weight_decay=decay, momentum=settings.momentum)
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        found: torch.optim.Optimizer = AdamW8bit(trained, lr=lr, weight_decay=decay, betas=betas, eps=settings.eps)
        return found
    return torch.optim.AdamW(trained, lr=lr, weight_decay=decay, betas=betas, eps=settings.eps, fused=True)


def check_optimizer(settings: TrainSettings) -> None:
    """Makes sure that the optimiser is installed, and can make a step on this machine.

    Raises:
        SettingError: It is not, or cannot.
    """
    if settings.optimizer != "adamw8bit":
        return
    others = " | ".join(name for name in OPTIMIZERS if name != "adamw8bit")
    try:
        parameter = torch.nn.Parameter(torch.ones(_STATES_OF_8_BIT))
        optimizer = make_optimizer([parameter], settings)
        parameter.grad = torch.ones_like(parameter)
        assert optimizer is not None
        optimizer.step()
        works = bool(torch.isfinite(parameter).all() and (parameter < 1).all())
    except ImportError as error:
        words = f"{others}, unless bitsandbytes is installed ({first_line(error)})"
        raise SettingError("train.optimizer", settings.optimizer, words) from None
    except Exception as error:  # noqa: BLE001  # whatever it is, the user is told, and nothing has begun
        words = f"{others}; bitsandbytes cannot make a step here ({first_line(error)})"
        raise SettingError("train.optimizer", settings.optimizer, words) from None
    if not works:
        raise SettingError("train.optimizer", settings.optimizer, f"{others}; bitsandbytes makes no step here")


def step(optimizer: torch.optim.Optimizer, share: float = 1.0) -> None:
    """One step with a share of the learning rate; gradients are gone afterwards."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies what an optimiser remembers, to the CPU.

    Args:
        optimizer: The optimiser; None has nothing to remember.
        parameters: What it trains, by name.

    Returns:
        Tensors by the parameter's name and what they are: "step", "exp_avg", …, after a colon.
    """
    if optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        f"{names[id(parameter)]}:{what}": torch.as_tensor(value).to("cpu", copy=True)
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
    }


def restore(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> None:
    """Sets the memory of an optimiser to what `moments` returned, as far as it still fits; nothing else is left of it.

    What an optimiser remembers of a parameter that does not train now, or that has another shape by now, is left out:
    that parameter begins anew.

    Args:
        optimizer: The optimiser; None remembers nothing.
        parameters: What it trains, by name.
        kept: What `moments` told.
    """
    if optimizer is None:
        return
    optimizer.state.clear()  # there may have been no step before the round that is taken back
    for name, value in fitting(kept, parameters).items():
        owner, _, what = name.rpartition(":")
        parameter = parameters[owner]
        whole = value.ndim == 0 and not value.is_floating_point()  # a plain number, where bitsandbytes counts steps
        optimizer.state[parameter][what] = int(value) if whole else value.to(parameter.device, copy=True)


def fitting(kept: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments of those parameters that are there, in the shape that the moments are of."""
    shapes: dict[str, bool] = {}
    for name, value in kept.items():
        parameter, _, what = name.rpartition(":")
        if what in _SHAPED:
            shapes[parameter] = parameter in parameters and value.shape == parameters[parameter].shape
    return {name: value for name, value in kept.items() if shapes.get(name.rpartition(":")[0], False)}


_SHAPED = ("exp_avg", "momentum_buffer", "state1")
"""What has the parameter's shape, in AdamW, in SGD and in bitsandbytes."""
