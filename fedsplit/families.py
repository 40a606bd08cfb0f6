"""Where each model family keeps its embedding, blocks, norm and head.

A record is all the family-specific code there is: `split` builds every part from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.config import SettingError


@dataclass(frozen=True)
class Family:
    """Attribute names inside the library's own model classes.

    Attributes:
        decoder: The decoder within the causal LM; its prefix in checkpoints.
        blocks: The list of blocks within the decoder.
        embedding: The token embedding within the decoder.
        norm: The final norm within the decoder.
        positions: The learned position embedding within the decoder, if there is one.
        dropout: The dropout after the embedding within the decoder, if there is one.
        rotary: The rotary position module within the decoder, if there is one.
        targets: Attention and MLP projections, by the last part of their names.
        transposed: Whether those projections are `Conv1D`, which store (in, out).
        layers_key: What the checkpoint's config.json calls the number of blocks.
        positions_key: What it calls the longest sequence.
    """

    decoder: str
    blocks: str
    embedding: str
    norm: str
    targets: tuple[str, ...]
    positions: str | None = None
    dropout: str | None = None
    rotary: str | None = None
    transposed: bool = False
    layers_key: str = "num_hidden_layers"
    positions_key: str = "max_position_embeddings"


FAMILIES = {
    "gpt2": Family(
        decoder="transformer",
        blocks="h",
        embedding="wte",
        norm="ln_f",
        targets=("c_attn", "c_proj", "c_fc"),
        positions="wpe",
        dropout="drop",
        transposed=True,
        layers_key="n_layer",
        positions_key="n_positions",
    ),
    "llama": Family(
        decoder="model",
        blocks="layers",
        embedding="embed_tokens",
        norm="norm",
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        rotary="rotary_emb",
    ),
}


@dataclass(frozen=True)
class Facts:
    """What a checkpoint's config.json says before anything is loaded.

    Attributes:
        family: The family's record.
        blocks: Number of blocks.
        positions: Longest sequence in tokens.
        end: The id of the token that ends a text.
    """

    family: Family
    blocks: int
    positions: int
    end: int


def family_of(model_type: str) -> Family:
    """Looks a family up.

    Raises:
        SettingError: There is no record for it.
    """
    if model_type not in FAMILIES:
        words = f"a model of type {' | '.join(FAMILIES)} (another type needs a record in fedsplit/families.py)"
        raise SettingError("model", f"a model of type {model_type}", words)
    return FAMILIES[model_type]


def read_facts(path: Path) -> Facts:
    """Reads a checkpoint's config.json, without transformers.

    Raises:
        SettingError: There is no such folder, it holds no checkpoint, or its family is unknown.
    """
    allowed = "the name of the bundled model, or a folder with config.json, tokenizer.json and *.safetensors"
    try:
        document: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = {}
    if not isinstance(document, dict) or not document:
        raise SettingError("model", path, allowed)
    if not any(path.glob("*.safetensors")):
        raise SettingError("model", f"{path} (no *.safetensors in it)", allowed)
    family = family_of(str(document.get("model_type")))
    numbers = []
    for key in (family.layers_key, family.positions_key, "eos_token_id"):
        value = document.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, bool) or not isinstance(value, int) or value < (0 if key == "eos_token_id" else 1):
            raise SettingError("model", f"{path} (its config.json has no possible {key})", allowed)
        numbers.append(value)
    return Facts(family, *numbers)
