"""The models that are measured: the bundled one, and one of GPT-2 small's shape with random weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.settings.config import BUNDLED_MODEL, DEFAULT_MODEL


def folder_of(model: Mapping[str, Any], cache: Path) -> str:
    """What `--model` is given for a model of the configuration; a random one is made if it is not there yet."""
    if not model.get("random"):
        return DEFAULT_MODEL
    folder = (cache / "gpt2-random").absolute()
    if not (folder / "config.json").exists():
        _make(folder)
    return str(folder)


def _make(folder: Path) -> None:
    """GPT-2's own configuration, its dropout included, and the bundled tokenizer, whose ids are all that occur."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(draft)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, draft)
    draft.rename(folder)
