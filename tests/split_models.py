"""Parts with adapters that are not zero, the unsplit model with the same ones, and a trunk in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import VOCABULARY
from peft import get_peft_model

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.client.link import Link
from fedsplit.generation.decoding import ClientHalf, DecodingSession, padded
from fedsplit.model.parts import Trunk
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.sessions import Sessions
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet

NEW = 6
"""Tokens that are written of each text, where nothing else is said."""

RAW = make_codec("raw")
SETTINGS = LoraSettings(rank=(3,), alpha=5.0, dropout=0.1)


def shape_of(packet: Packet, name: str = "hidden") -> tuple[int, ...]:
    """Shape of a tensor of a packet."""
    return tuple(RAW.decode(packet.tensors[name]).shape)


def batch_of(padding: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Tokens, mask and labels of three sequences."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (3, 13), generator=generator)
    if padding == "none":
        return ids, None, ids
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 1, 0)):
        if length and padding == "left":
            mask[row, :length] = 0
        elif length:
            mask[row, -length:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def logits_of(parts: list[Any], ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What bottom, trunk and top make of tokens."""
    bottom, trunk, top = parts
    return top.logits(trunk(bottom(ids, mask), mask), mask)


def parts_of(
    path: Path, cut: tuple[int, int], dtype: torch.dtype = torch.float32, kernels: str = "library", size: float = 0.3
) -> list[Any]:
    """Bottom, trunk and top."""
    parts = load_parts(path, cut, ("bottom", "trunk", "top"), dtype, kernels)
    for part in parts:
        lora.add(part, SETTINGS, seed=0)
        for name, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
        part.eval()
    return parts


def whole_of(path: Path, parts: list[Any], dtype: torch.dtype = torch.float32) -> Any:
    """The unsplit model under PEFT with the parts' adapters; nothing ends a text of it."""
    base = load_unsplit(path, dtype)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = None, 0
    whole = get_peft_model(base, make_config(SETTINGS, parts[0].family)).eval()
    given = lora.read(*parts).tensors
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            parameter.data = given[name.removeprefix("base_model.model.").replace(".default", "")].clone()
    return whole


def server_of(trunk: Trunk, **how: Any) -> TrunkServer:
    return TrunkServer(trunk, RAW, "shared", TrainSettings(), seed=0, run="run", incarnation="first", **how)


class Here:
    """A trunk in this process that remembers what it was sent."""

    def __init__(self, trunk: Trunk, **how: Any) -> None:
        self.server = server_of(trunk, **how)
        self.sessions = Sessions(self.server, lease=600.0)
        self.sent: list[Packet] = []

    def send(self, packet: Packet) -> Callable[[], Packet]:
        self.sent.append(packet)
        answer = self.sessions.serve(packet)
        return lambda: answer

    def leave(self, client: int) -> None:
        self.sessions.leave(client)


def ends_of(parts: list[Any]) -> tuple[ClientHalf, Here]:
    """A client with its bottom and top, and the trunk that it talks to."""
    here = Here(parts[1])
    return ClientHalf(0, parts[0], parts[2], Link(here, RAW, SCHEDULES["shared"], "run", "first")), here


def walked(ends: ClientHalf, prompts: list[list[int]], count: int = NEW) -> torch.Tensor:
    """Logits (B, count, V) along the likeliest tokens."""
    ids, mask = padded(prompts)
    found = []
    with DecodingSession(ends, mask) as walk:
        for _ in range(count):
            found.append(walk.step(ids))
            ids = found[-1].argmax(-1)[:, None]
    return torch.stack(found, 1)
