"""Optimisers for the adapters of clients and trunk: making, steps, and the state (moments) between rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsplit.errors import SettingError, first_line
from fedsplit.settings.choices import OPTIMIZERS
from fedsplit.settings.sections import TrainSettings

_STATES_OF_8_BIT = 4096
"""Smallest number of values of a tensor for moments in 8 bits. bitsandbytes keeps smaller tensors' moments in 32."""

_SHAPED = ("exp_avg", "momentum_buffer", "state1")
"""Names of moments with the shape of the parameter: in AdamW, in SGD and in bitsandbytes."""


def make_optimizer(parameters: Iterable[Tensor], settings: TrainSettings) -> torch.optim.Optimizer | None:
    """Returns AdamW (1711.05101), SGD, or AdamW with moments in 8 bits (2110.02861).

    Args:
        parameters: Parameters to train.
        settings: Name of the optimiser, learning rate, weight decay, betas, eps and momentum.

    Returns:
        The optimiser; None without parameters, as for a bottom without blocks.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> type(make_optimizer([parameter], TrainSettings(optimizer="sgd"))).__name__
        'SGD'
        >>> make_optimizer([], TrainSettings()) is None
        True
    """
    trained = list(parameters)
    if not trained:
        return None
    lr = settings.lr
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=lr, weight_decay=decay, momentum=settings.momentum)

    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # an optional dependency

        narrow: torch.optim.Optimizer = AdamW8bit(
            trained,
            lr=lr,
            weight_decay=decay,
            betas=betas,
            eps=settings.eps,
        )
        return narrow
    return torch.optim.AdamW(
        trained,
        lr=lr,
        weight_decay=decay,
        betas=betas,
        eps=settings.eps,
        fused=True,  # one kernel for all tensors of an adapter, which are many and small
    )


def check_optimizer(settings: TrainSettings) -> None:
    """Checks that the optimiser is installed, and can make a step on this machine.

    Raises:
        SettingError: The optimiser is missing, or fails at a step.

    Example:
        >>> check_optimizer(TrainSettings(optimizer="adamw"))
    """
    if settings.optimizer != "adamw8bit":  # torch itself has the rest
        return
    others = " | ".join(name for name in OPTIMIZERS if name != "adamw8bit")
    try:
        parameter = torch.nn.Parameter(torch.ones(_STATES_OF_8_BIT))
        optimizer = make_optimizer([parameter], settings)
        parameter.grad = torch.ones_like(parameter)
        assert optimizer is not None
        optimizer.step()
        # A build for an unknown GPU or CPU may return without an error, and change nothing.
        works = bool(torch.isfinite(parameter).all() and (parameter < 1).all())
    except ImportError as error:
        words = f"{others}, unless bitsandbytes is installed ({first_line(error)})"
        raise SettingError("train.optimizer", settings.optimizer, words) from None
    except Exception as error:  # noqa: BLE001  # native code raises many kinds; any kind is a wrong choice of optimiser
        words = f"{others}; bitsandbytes cannot make a step here ({first_line(error)})"
        raise SettingError("train.optimizer", settings.optimizer, words) from None
    if not works:
        raise SettingError("train.optimizer", settings.optimizer, f"{others}; bitsandbytes makes no step here")


def step(optimizer: torch.optim.Optimizer, share: float = 1.0) -> None:
    """Makes one step, and drops the gradients.

    Args:
        optimizer: The optimiser.
        share: Share of the learning rate.

    Example:
        >>> parameter = torch.nn.Parameter(torch.tensor([1.0]))
        >>> parameter.grad = torch.tensor([1.0])
        >>> step(torch.optim.SGD([parameter], lr=0.1), share=0.5)
        >>> parameter.data, parameter.grad
        (tensor([0.9500]), None)
    """
    for group in optimizer.param_groups:
        # The key under which torch's own schedulers keep the full rate.
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of an optimiser's state, on the CPU.

    Args:
        optimizer: The optimiser; None has no state.
        parameters: Parameters of the optimiser, by name.

    Returns:
        Tensors by parameter and kind, such as "layer.lora_A:exp_avg".

    Example:
        >>> parameter = torch.nn.Parameter(torch.tensor([1.0]))
        >>> parameter.grad = torch.tensor([1.0])
        >>> optimizer = torch.optim.AdamW([parameter])
        >>> step(optimizer)
        >>> sorted(moments(optimizer, {"w": parameter}))
        ['w:exp_avg', 'w:exp_avg_sq', 'w:step']
    """
    if optimizer is None:
        return {}
    # By identity: the optimiser's state has the parameters themselves as keys.
    names = {id(parameter): name for name, parameter in parameters.items()}
    copied = {}
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            # `as_tensor`, since bitsandbytes counts steps in a plain number.
            copied[f"{names[id(parameter)]}:{kind}"] = torch.as_tensor(value).to("cpu", copy=True)
    return copied


def restore(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> None:
    """Replaces the state of an optimiser by an earlier result of `moments`, as far as the shapes fit.

    The state of a parameter that is not trained, or has a new shape, is left out. The optimiser begins anew for such a
    parameter.

    Args:
        optimizer: The optimiser; None has no state.
        parameters: Parameters of the optimiser, by name.
        kept: Result of `moments`.
    """
    if optimizer is None:
        return
    optimizer.state.clear()  # an undone step may have been the first: then there is no earlier state to write over it
    for name, value in fitting(kept, parameters).items():
        owner, _, kind = name.rpartition(":")
        parameter = parameters[owner]
        is_count = value.ndim == 0 and not value.is_floating_point()
        if is_count:  # bitsandbytes counts steps in a plain number
            optimizer.state[parameter][kind] = int(value)
        else:
            optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)


def fitting(kept: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the moments of existing parameters with an unchanged shape.

    Args:
        kept: Result of `moments`.
        parameters: Parameters by name.

    Example:
        >>> kept = {"a:exp_avg": torch.zeros(2), "a:step": torch.tensor(1.0), "b:exp_avg": torch.zeros(3)}
        >>> sorted(fitting(kept, {"a": torch.zeros(2), "b": torch.zeros(4)}))
        ['a:exp_avg', 'a:step']
    """
    fits: dict[str, bool] = {}
    for name, value in kept.items():
        parameter, _, kind = name.rpartition(":")
        # Other moments, such as the number of steps, have no shape to compare, and go with the parameter's first one.
        if kind in _SHAPED:
            fits[parameter] = parameter in parameters and value.shape == parameters[parameter].shape
    fitting_moments = {}
    for name, value in kept.items():
        parameter, _, _ = name.rpartition(":")
        if fits.get(parameter, False):
            fitting_moments[name] = value
    return fitting_moments
