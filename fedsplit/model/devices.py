"""What a part computes on: what a setting means on this machine, and tensors put there.

Between processes everything travels as bytes of the CPU's: packets, adapters, moments. Whoever owns a part puts what
arrives on the part's device and takes what leaves off it. All processes see all GPUs of the machine, as many of them
as share one: Ray is asked for none, so it hides none (`RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.allowed import SettingError
from fedsplit.config import Config

CPU = torch.device("cpu")

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a part computes in, by the names in `fedsplit.allowed.DTYPES`."""


def resolve(name: str) -> torch.device:
    """The device that a setting names.

    Args:
        name: "cpu", "cuda:N", "cuda" for the first GPU, or "auto" for that where torch sees one, and the CPU elsewhere.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda:0" if name == "cuda" else name)


def seen() -> str:
    """The devices that can be named on this machine, in words."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return f"auto | cpu | cuda | {' | '.join(f'cuda:{number}' for number in range(count))}, which torch sees here"
    why = "torch sees no GPU here" if torch.backends.cuda.is_built() else "this torch is built for the CPU alone"
    return f"auto | cpu ({why})"


def check_device(setting: str, name: str) -> None:
    """Makes sure that a device is there.

    Args:
        setting: The setting that names it.
        name: As in `resolve`.

    Raises:
        SettingError: It is not.
    """
    device = resolve(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise SettingError(setting, name, seen())


def check_devices(config: Config) -> None:
    """Makes sure that a run's devices are there, and can do what is asked of them.

    Raises:
        SettingError: One is not, or a budget for resident memory is given to a trunk on a GPU.
    """
    check_device("device", config.device)
    if config.trunk.device:
        check_device("trunk.device", config.trunk.device)
    if config.trunk.memory and resolve(config.device_of("trunk")) != CPU:
        words = "none where the trunk is on a GPU: it is a budget for the process's memory, not for the GPU's"
        raise SettingError("trunk.memory", config.trunk.memory, words)


def put(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on a device; those that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def device_of(module: torch.nn.Module) -> torch.device:
    """What a module computes on: where its first parameter is."""
    return next((parameter.device for parameter in module.parameters()), CPU)
