"""Models of known shapes with random weights, made once in a cache."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.settings.config import BUNDLED_MODEL, DEFAULT_MODEL


def model_of(name: str, model: Mapping[str, Any], cache: Path) -> str:
    """What `--model` is given.

    Args:
        name: Name of the model.
        model: Its table in the configuration, with the values of its config.json; none of these for the bundled one.
        cache: Where random models lie.
    """
    if "config" not in model:
        return DEFAULT_MODEL
    folder = (cache / name.replace(" ", "-").replace(",", "")).absolute()
    if not (folder / "config.json").exists():
        _make(model["config"], folder)
    return str(folder)


def _make(values: Mapping[str, Any], folder: Path) -> None:
    """Writes a model with the bundled tokenizer, whose ids are all that occur."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**values, "bos_token_id": 0, "eos_token_id": 0})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(draft)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, draft)
    draft.rename(folder)
