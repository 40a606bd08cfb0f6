"""What an adapter makes of its base model, in logits and in weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedsplit.adaptation import adapter_files
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.finished import Adapter

IDS = torch.arange(40).reshape(2, 20)


def base_of(adapter: Adapter) -> torch.nn.Module:
    base = load_unsplit(adapter.model_path)
    return base.bfloat16().float() if adapter.dtype == "bf16" else base


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def changes(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds, multiplied out: (out, in) by layer."""
    read = adapter_files.load(folder)
    return {layer: (change := read.change(layer)).up @ change.down for layer in read.complete}
