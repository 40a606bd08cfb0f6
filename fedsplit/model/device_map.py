"""Spreads the blocks of a part over several devices. accelerate moves hidden states from device to device.

No block is split. The devices compute one after the other, so several devices hold a larger trunk, and do not make a
step faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedsplit.errors import SettingError
from fedsplit.model.parts import Part

_UNKNOWN = 2**60
"""Bytes that count as free on a device whose memory torch cannot read."""


def plan(part: Part, devices: Sequence[torch.device]) -> list[torch.device]:
    """Returns the device of every block. Each device gets bytes of weights in proportion to its free memory.

    accelerate's `infer_auto_device_map` is not used: it leaves devices empty where blocks are few. It puts two blocks
    on the first of two devices, and four blocks on three of four.

    Args:
        part: The part. Its weights may be on the meta device.
        devices: Devices in the order in which the hidden states visit them.

    Raises:
        SettingError: The weights do not fit into the free memory of the devices.

    Example:
        >>> from fedsplit.model.split import empty_part
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> trunk = empty_part(BUNDLED_MODEL, (1, 5), "trunk", torch.float32, fused=False, classes=0)
        >>> plan(trunk, [torch.device("cpu"), torch.device("meta")])
        [device(type='cpu'), device(type='cpu'), device(type='meta'), device(type='meta')]
    """
    sizes = [_bytes_of(block) for block in _blocks(part)]
    free = [_free_bytes(device) for device in devices]
    all_free = sum(free)
    all_bytes = sum(sizes)
    ends = [sum(free[: place + 1]) / all_free * all_bytes for place in range(len(devices))]
    by_block = []
    used = dict.fromkeys(devices, 0)
    for block, size in enumerate(sizes):
        # A block that lies across the border of two shares goes to the device that has the larger piece of the block.
        middle = sum(sizes[:block]) + size / 2
        device = next(device for device, end in zip(devices, ends, strict=True) if middle <= end)
        by_block.append(device)
        used[device] += size
    for device, room in zip(devices, free, strict=True):
        if used[device] > room:
            words = f"devices with room for the trunk's weights; {device} would get {used[device] // 10**6} MB"
            raise SettingError("trunk.devices", ",".join(map(str, devices)), words)
    return by_block


def dispatch(part: Part, by_block: Sequence[torch.device]) -> None:
    """Makes the blocks of a part take their inputs to their devices, in place. The output is where the input is.

    Args:
        part: The part. The weights of every block are on the block's device already.
        by_block: Result of `plan`.
    """
    from accelerate import dispatch_model  # takes a second to import

    first = by_block[0]
    places = {name: first for name, _ in part.decoder.named_children() if name != part.family.blocks}
    for block, device in enumerate(by_block):
        places[f"{part.family.blocks}.{block}"] = device
    # A cache has the keys and values of all blocks, each on the device of its block.
    dispatch_model(part.decoder, places, main_device=first, skip_keys="past_key_values")


def _blocks(part: Part) -> nn.ModuleList:
    blocks: nn.ModuleList = getattr(part.decoder, part.family.blocks)
    return blocks


def _bytes_of(block: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())


def _free_bytes(device: torch.device) -> int:
    """Returns the free memory of a GPU."""
    if device.type != "cuda":
        return _UNKNOWN
    free, _ = torch.cuda.mem_get_info(device)
    return free
