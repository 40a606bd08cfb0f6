"""Devices on which parts compute.

Processes exchange CPU tensors only: packets, adapters, optimiser moments. The owner of a part moves incoming tensors
to the part's device, and outgoing ones to the CPU. Every process sees all GPUs of the machine, and several processes
may share one. Ray is not asked for GPUs, so it hides none (`RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.errors import SettingError
from fedsplit.settings.config import Config

CPU = torch.device("cpu")

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of base weights and computation, by the names in `fedsplit.settings.choices.DTYPES`."""


def resolve(name: str) -> torch.device:
    """Returns the device with a name.

    Args:
        name: "cpu", "cuda:N", "cuda" for the first GPU, or "auto" for the first GPU if torch sees one, else the CPU.

    Example:
        >>> resolve("cuda")
        device(type='cuda', index=0)
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda:0" if name == "cuda" else name)


def available_devices() -> str:
    """Describes the devices of this machine, for error messages."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        numbered = " | ".join(f"cuda:{number}" for number in range(count))
        return f"auto | cpu | cuda | {numbered}, which torch sees here"
    why = "torch sees no GPU here" if torch.backends.cuda.is_built() else "this torch is built for the CPU alone"
    return f"auto | cpu ({why})"


def check_device(setting: str, name: str) -> None:
    """Checks that this machine has a device.

    Args:
        setting: Name of the setting, for the error.
        name: The device, as for `resolve`.

    Raises:
        SettingError: The machine does not have the device.

    Example:
        >>> check_device("device", "cpu")
    """
    device = resolve(name)
    if device.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = device.index or 0
    if number >= count:
        raise SettingError(setting, name, available_devices())


def check_devices(config: Config) -> None:
    """Checks the devices of a run.

    Raises:
        SettingError: The machine lacks a device, or a trunk on a GPU has a budget for resident memory.
    """
    check_device("device", config.device)
    if config.trunk.device:
        check_device("trunk.device", config.trunk.device)
    # The budget is measured as resident memory, which does not grow with tensors on a GPU.
    if config.trunk.memory and resolve(config.device_of("trunk")) != CPU:
        words = "none where the trunk is on a GPU: it is a budget for the process's memory, not for the GPU's"
        raise SettingError("trunk.memory", config.trunk.memory, words)


def put(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves tensors to a device. A tensor on the same device is not copied.

    Example:
        >>> tensors = {"w": torch.zeros(2)}
        >>> put(tensors, CPU)["w"] is tensors["w"]
        True
    """
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def device_of(module: torch.nn.Module) -> torch.device:
    """Returns the device of a module's first parameter; the CPU for a module without parameters."""
    return next((parameter.device for parameter in module.parameters()), CPU)
