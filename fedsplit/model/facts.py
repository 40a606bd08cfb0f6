"""Facts about a model from small files, before any weight is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from fedsplit.errors import SettingError, one_line
from fedsplit.model.derivation import Underivable, family_of, text_config
from fedsplit.model.families import Family
from fedsplit.model.fp8_weights import METHOD
from fedsplit.model.miniature import DEPTHS, identity_of
from fedsplit.model.sharing import closed_places
from fedsplit.model.stored_bits import bits_in
from fedsplit.model.token_ids import end_token, text_part


@dataclass(frozen=True)
class Facts:
    """Facts about a model from small files, before any weight is loaded.

    Attributes:
        family: Record of the model family.
        blocks: Number of blocks.
        positions: Longest sequence in tokens.
        end: Id of the token that ends a text (`fedsplit.model.token_ids.end_token`).
        width: Size of a hidden state; 0 if config.json has no size.
        experts: Number of experts in each block with experts.
        routed: Numbers of the blocks with experts.
        router_aux_loss: Coefficient of the routers' auxiliary loss in the unsplit model.
        loses_balance: True if the unsplit model trains such a loss, and parts of this type cannot.
        closed: Places between blocks that share keys and values, where no cut may be
            (`fedsplit.model.sharing.closed_places`).
        bits: Bits of weights that bitsandbytes has quantised in the checkpoint; 0 for other weights.
    """

    family: Family
    blocks: int
    positions: int
    end: int
    width: int = 0
    experts: int = 0
    routed: tuple[int, ...] = ()
    router_aux_loss: float = 0.0
    loses_balance: bool = False
    closed: frozenset[int] = frozenset()
    bits: int = 0

    def coefficient(self, asked: float) -> float:
        """Returns the coefficient of the auxiliary loss.

        Args:
            asked: The setting. Below 0, the value in config.json counts.
        """
        return self.router_aux_loss if asked < 0 else asked


_REQUIRED: Mapping[str, tuple[object, ...]] = {
    "is_causal": (True,),  # if a token attended to later tokens, the next token would be no target of training
    "use_bidirectional_attention": (False, "vision"),  # within an image, and there are none
    "add_cross_attention": (False,),  # cross-attention would need an encoder
    "layerdrop": (0,),  # each part would drop other blocks
}
"""Possible values in config.json. A missing key is accepted."""

_LONGEST = ("max_position_embeddings", "max_seq_len", "seq_length", "max_sequence_length")
"""Names of the longest sequence in the library's configurations."""

_COUNTED: dict[str, tuple[int, tuple[int, ...]]] = {}
"""Results of `_count_experts` by configuration: the facts of a model are read several times in a process."""

_MOST_BLOCKS = 2_000
"""Largest number of blocks: far beyond any model, and few enough to be outlined in seconds."""

NO_LIMIT = 2**30
"""Longest sequence of a model without positions, such as a state-space model."""


def _check_required(document: Mapping[str, Any], allowed: str) -> None:
    """Refuses a model that cannot be split exactly.

    Raises:
        SettingError: A key of config.json has a value that is not allowed.
    """
    for key, possible in _REQUIRED.items():
        value = document.get(key)
        if value is not None and value not in possible:
            described = " or ".join(map(json.dumps, possible))
            raise SettingError("model", f"{key} {json.dumps(value)} in config.json", f"{described}; {allowed}")


def read_facts(path: Path) -> Facts:
    """Reads the config.json of a checkpoint, and the files that may name the end token.

    Args:
        path: Folder of the checkpoint.

    Raises:
        SettingError: The folder holds no model, the model is no causal decoder, the model cannot be split, or no file
            has the token that ends a text.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> facts = read_facts(BUNDLED_MODEL)
        >>> facts.blocks, facts.positions, facts.width
        (6, 256, 128)
    """
    allowed = "a model with a config.json that transformers can read"
    document = _read_document(path, allowed)
    config = read_config(path)
    text = text_part(document)
    _check_required(text, allowed)
    blocks = config.num_hidden_layers
    if not _is_whole(blocks) or blocks < 1:
        raise SettingError("model", f"{path} (its config.json has no possible num_hidden_layers)", allowed)
    family = family_of(config)
    width = getattr(config, "hidden_size", 0)
    return Facts(
        family,
        blocks,
        _possible_positions(config, path, allowed),
        end=end_token(path),
        width=width if _is_whole(width) else 0,
        loses_balance=family.balances and family.router is None and bool(text.get("output_router_logits")),
        closed=closed_places(config),
        bits=bits_in(document.get("quantization_config") or {}),
        **_read_experts(family, config, text, path, allowed),
    )


def read_config(path: Path) -> PretrainedConfig:
    """Returns the configuration of a model's text decoder.

    Args:
        path: Folder with config.json.

    Raises:
        SettingError: transformers refuses config.json, the model has no causal text decoder, or it has an impossible
            number of blocks.
    """
    _check_depth(path)
    try:
        return text_config(path)
    except Underivable as error:
        raise SettingError("model", f"{path} ({error})", "a causal decoder, or a model with one inside") from None
    except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
        allowed = "a model with a config.json that transformers can read"
        raise SettingError("model", f"{path} ({one_line(error)})", allowed) from None


def _check_depth(path: Path) -> None:
    """Checks the number of blocks before the library makes a list with an entry for each.

    Raises:
        SettingError: config.json has more blocks than any model.
    """
    try:
        document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the library says what is wrong
    if not isinstance(document, dict):
        return
    # The number may stand in a nested configuration, such as the text model of a model of images.
    parts = [document, *(part for part in document.values() if isinstance(part, dict))]
    for blocks in (part.get(key) for part in parts for key in DEPTHS):
        if _is_whole(blocks) and blocks > _MOST_BLOCKS:
            raise SettingError("model", f"{path} (its config.json has {blocks} blocks)", f"up to {_MOST_BLOCKS} blocks")


def positions_of(config: PretrainedConfig) -> int:
    """Returns the longest sequence of a model in tokens; `NO_LIMIT` for a model without positions.

    Example:
        >>> from transformers import GPT2Config, MambaConfig
        >>> positions_of(GPT2Config()), positions_of(MambaConfig()) == NO_LIMIT
        (1024, True)
    """
    values = (getattr(config, key, None) for key in _LONGEST)
    return next((value for value in values if value is not None), NO_LIMIT)


def _possible_positions(config: PretrainedConfig, path: Path, allowed: str) -> int:
    """Returns the longest sequence of a model in tokens.

    Raises:
        SettingError: config.json has an impossible number.
    """
    longest = positions_of(config)
    if not _is_whole(longest) or longest < 1:
        key = next(key for key in _LONGEST if getattr(config, key, None) is not None)
        raise SettingError("model", f"{path} (its config.json has no possible {key})", allowed)
    return longest


def _is_whole(value: Any) -> TypeGuard[int]:
    """Returns True for a whole number. JSON's true is a number to Python, and no size of a model."""
    return isinstance(value, int) and not isinstance(value, bool)


def _read_document(path: Path, allowed: str) -> dict[str, Any]:
    """Reads config.json, and refuses kinds of models that fedsplit would load wrongly.

    Args:
        path: Folder of the checkpoint.
        allowed: Description of possible models, for errors.

    Raises:
        SettingError: The file cannot be read, or the model is of a refused kind.
    """
    try:
        document: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = {}
    if not isinstance(document, dict) or not document:
        raise SettingError("model", path, allowed)
    quantised = document.get("quantization_config")
    settings = quantised if isinstance(quantised, dict) else {}
    method = settings.get("quant_method", quantised)
    if quantised and method != METHOD and not bits_in(settings):  # the scales of the weights would be ignored
        unquantised = "weights in fp32, bf16, fp16, fp8, or in 4 or 8 bits by bitsandbytes; see --quantization"
        raise SettingError("model", f"{path} (its weights are quantised already, by {method})", unquantised)
    weight_file = document.get("transformers_weights")
    if weight_file is not None:  # transformers would load the named file only
        reason = f"its config.json has the transformers_weights {json.dumps(weight_file)}"
        raise SettingError("model", f"{path} ({reason})", "a model without it, whose weights have the usual names")
    return document


def _read_experts(
    family: Family,
    config: PretrainedConfig,
    document: Mapping[str, Any],
    path: Path,
    allowed: str,
) -> dict[str, Any]:
    """Returns the facts about a mixture of experts, by the names in `Facts`. Empty for a model without a router.

    Raises:
        SettingError: config.json has an impossible number of experts or coefficient.
    """
    stacked = next((path for path in family.parameters.values() if "experts" in path), None)
    sign = family.router or stacked
    if sign is None:
        return {}
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    is_number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
    if not is_number or not 0 <= coefficient < math.inf:
        raise SettingError("model", f"{path} (its config.json has no possible router_aux_loss_coef)", allowed)

    experts, routed = _count_experts(config, family, sign, stacked)
    balances = family.router and routed and document.get("output_router_logits")
    return {
        "experts": experts,
        "routed": routed,
        "router_aux_loss": float(coefficient) if balances else 0.0,
    }


def _count_experts(
    config: PretrainedConfig, family: Family, sign: str, stacked: str | None
) -> tuple[int, tuple[int, ...]]:
    """Returns the number of experts in a block, and the numbers of the blocks with experts.

    Args:
        config: Configuration of the text decoder.
        family: Names of its modules.
        sign: Name of a module or parameter inside a block that only a block with experts has.
        stacked: Name of a parameter of all experts inside a block; None if no such parameter is known.
    """
    key = identity_of(config)
    if key not in _COUNTED:
        # The whole model in outline: which blocks have experts is up to the library's code, and the outline takes no
        # memory.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        blocks = getattr(model.get_submodule(family.decoder), family.blocks)
        routed = []
        experts = 0
        for number, block in enumerate(blocks):
            inside = {name for name, _ in block.named_modules()}
            inside |= {name for name, _ in block.named_parameters()}
            if sign in inside:
                routed.append(number)
            if stacked in inside:
                experts = len(block.get_parameter(stacked))
        _COUNTED[key] = experts, tuple(routed)
    return _COUNTED[key]


def read_pad(path: Path, end: int) -> int:
    """Returns the padding token of a model: from config.json if the value is possible, else the end token.

    Padding is masked, so the choice changes no number.

    Args:
        path: Folder of the checkpoint.
        end: Id of the token that ends a text.
    """
    document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    text = text_part(document)
    pad = text.get("pad_token_id", document.get("pad_token_id"))
    size = text.get("vocab_size")
    if not _is_whole(pad) or pad < 0:
        return end
    if isinstance(size, int) and pad >= size:  # the embedding has no row for the token
        return end
    return int(pad)
