"""Devices on which parts compute.

Processes exchange CPU tensors only: packets, adapters, optimiser moments. The owner of a part moves incoming tensors
to the part's device, and outgoing ones to the CPU. Every process sees all GPUs of the machine, and several processes
may share one. Ray is not asked for GPUs, so it hides none (`RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsplit.errors import SettingError
from fedsplit.settings.config import Config

CPU = torch.device("cpu")

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of base weights and computation, by the names in `fedsplit.settings.choices.DTYPES`."""


def resolve(name: str, rank: int = 0) -> torch.device:
    """Returns the device with a name.

    Args:
        name: "cpu", "cuda:N", "cuda" for the first GPU, or "auto" for the first GPU if torch sees one, else the CPU.
        rank: Number of this process among several that share the device's work. "cuda" and "auto" are another GPU for
            each, unless this process sees too few.

    Example:
        >>> resolve("cuda")
        device(type='cuda', index=0)
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        has_own = torch.cuda.is_available() and rank < torch.cuda.device_count()
        name = f"cuda:{rank if has_own else 0}"
    return torch.device(name)


def trunk_devices(config: Config) -> list[torch.device]:
    """Returns the devices of a trunk that is spread over several; none for a trunk on one device.

    Example:
        >>> trunk_devices(Config())
        []
    """
    if config.trunk.devices == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.device("cuda", number) for number in range(count)]
    # Without the empty text that is left where no device is named.
    return [torch.device(name) for name in filter(None, config.trunk.devices.split(","))]


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
    if config.trunk.devices:
        _check_trunk_devices(config)
    # The budget is measured as resident memory, which does not grow with tensors on a GPU.
    is_on_gpu = bool(config.trunk.devices) or resolve(config.device_of("trunk")) != CPU
    if config.trunk.memory and is_on_gpu:
        words = "none where the trunk is on a GPU: it is a budget for the process's memory, not for the GPU's"
        raise SettingError("trunk.memory", config.trunk.memory, words)


def _check_trunk_devices(config: Config) -> None:
    """Checks a trunk on several devices.

    Raises:
        SettingError: The machine lacks a device, there are more devices than blocks, or a further setting excludes
            several devices.
    """
    value = config.trunk.devices
    if config.trunk.device:
        words = f"none with --trunk.devices {value}, which names the devices of the same blocks"
        raise SettingError("trunk.device", config.trunk.device, words)
    if "trunk" in config.bits:
        words = "parts without the trunk with --trunk.devices: quantised weights were not tried on several devices"
        raise SettingError("quantization", config.quantization, words)
    devices = trunk_devices(config)
    if not devices:
        raise SettingError("trunk.devices", value, f"GPUs of this machine; {available_devices()}")
    for device in devices:
        check_device("trunk.devices", str(device))
    low, high = config.bounds
    if len(devices) > high - low:
        words = f"at most {high - low} devices, as many as the trunk has blocks: no block is split"
        raise SettingError("trunk.devices", f"{value} ({len(devices)} devices)", words)


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


def seed_generators(seed: int, devices: Iterable[torch.device]) -> None:
    """Seeds the random generators of the CPU and of devices, which then draw as after `torch.manual_seed`.

    `torch.manual_seed` would note a seed and a stack trace for each kind of GPU that is not there: a third of a
    millisecond, three times a step.

    Example:
        >>> seed_generators(3, [CPU])
        >>> first = torch.rand(2)
        >>> _ = torch.manual_seed(3)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    torch.default_generator.manual_seed(seed)
    for kind in {device.type for device in devices} - {CPU.type}:
        torch.get_device_module(kind).manual_seed_all(seed)


def random_state(device: torch.device) -> Tensor:
    """Returns the state of a device's random generator, as bytes on the CPU.

    Example:
        >>> random_state(CPU).dtype
        torch.uint8
    """
    state: Tensor = torch.get_rng_state() if device == CPU else torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Sets a device's random generator to an earlier result of `random_state`."""
    if device == CPU:
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
