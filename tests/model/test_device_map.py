"""Blocks over several devices: who gets which, where the weights go, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.errors import SettingError
from fedsplit.model import device_map
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.split import empty_part, load_parts
from fedsplit.settings.config import BUNDLED_MODEL

META = torch.device("meta")
CPU = torch.device("cpu")


def with_memory(monkeypatch: pytest.MonkeyPatch, *free: int) -> list[torch.device]:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 10**12))
    return [torch.device("cuda", number) for number in range(len(free))]


def places(low: int, high: int, devices: list[torch.device]) -> list[int]:
    trunk = empty_part(BUNDLED_MODEL, (low, high), "trunk", torch.float32, fused=False, classes=0)
    return [devices.index(device) for device in device_map.plan(trunk, devices)]


def test_blocks_are_shared_out_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = with_memory(monkeypatch, *[10**9] * 4)
    assert places(1, 5, equal) == [0, 1, 2, 3]
    assert places(1, 5, equal[:2]) == [0, 0, 1, 1]
    assert places(1, 4, equal[:2]) in ([0, 0, 1], [0, 1, 1])
    assert places(1, 3, equal[:1]) == [0, 0]
    assert places(0, 6, with_memory(monkeypatch, 10**9, 2 * 10**9)) == [0, 0, 1, 1, 1, 1]


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = with_memory(monkeypatch, 10**6, 10**6)  # a block has 0.8 MB
    assert places(1, 3, devices) == [0, 1]
    with pytest.raises(SettingError, match=r"trunk\.devices: cuda:0,cuda:1 .* cuda:0 would get 1 MB"):
        places(1, 5, devices)


def test_every_block_is_read_onto_its_device(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them onto the first, from where they would be moved."""
    read: dict[str, torch.device | None] = {}
    parameter = CheckpointReader.parameter

    def remembered(reader: CheckpointReader, name: str, device: torch.device | None = None) -> torch.nn.Parameter:
        read[name] = device
        return parameter(reader, name, device)

    monkeypatch.setattr(CheckpointReader, "parameter", remembered)
    (trunk,) = load_parts(tiny_models["llama"], (1, 3), ["trunk"], devices=[CPU, META])
    here, there = trunk.decoder.layers
    assert {parameter.device for parameter in here.parameters()} == {CPU}
    assert {parameter.device for parameter in there.parameters()} == {META}
    assert trunk.decoder.rotary_emb.inv_freq.device == CPU
    assert {name.split(".")[2] for name in read} == {"1", "2"}
    for name, place in read.items():
        assert place == (CPU if name.startswith("model.layers.1.") else META), name


def test_one_device_needs_no_hooks(tiny_models: dict[str, Path]) -> None:
    (trunk,) = load_parts(tiny_models["llama"], (1, 3), ["trunk"], devices=[CPU])
    assert not any(hasattr(module, "_hf_hook") for module in trunk.modules())
