"""Model families: names of the embedding, blocks, norm and head inside the library's model classes.

A `Family` record is all that fedsplit needs to know about a family. `fedsplit.model.split` builds parts from records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from fedsplit.errors import SettingError
from fedsplit.model.token_ids import end_token


@dataclass(frozen=True)
class Family:
    """Names of a family's modules and settings.

    Attributes:
        decoder: Name of the decoder inside the language model, dotted if nested; also the prefix in checkpoints.
        blocks: Name of the list of blocks inside the decoder.
        embedding: Name of the token embedding inside the decoder.
        norm: Name of the final norm inside the decoder. The attribute's value may be None.
        targets: Names of the attention and MLP projections inside a block, last component only.
        positions: Name of the learned position embedding inside the decoder; None for a family without one.
        dropout: Name of the dropout after the embedding inside the decoder; None for a family without one.
        rotary: Name of the rotary position module inside the decoder; None for a family without one.
        transposed: True if the projections are `Conv1D`, which stores weights as (in, out).
        norms: Names of the norms inside a block, last component only.
        narrows: Names of the MLP projections back to the hidden size, by their last components.
        layers_key: Key of config.json for the number of blocks.
        positions_key: Key of config.json for the longest sequence.
        width_key: Key of config.json for the size of a hidden state.
        cap_key: Key of config.json for the soft cap on logits; None for a family without one.
        stored: Names in checkpoints that differ from the library's names, by the end of a parameter's name. A parameter
            may be stored in several pieces, to be joined by rows. `*` stands for the number of an expert; the tensors
            of the experts are stacked.
        outgrows: Key of config.json for a length beyond which rotary positions change. The library computes longer
            text anew.
        required: Required values in config.json, by key. A missing key is accepted. A required value may be the name of
            a second key, and stands for the value of the second key. No further values can be split exactly.
        router: Name of the router inside a block with experts; None for a family without experts.
        experts: Number of experts in a block with experts, if config.json has no number.
        sparse: True if config.json may exempt blocks from having experts (`mlp_only_layers`, `decoder_sparse_step`).
        parameters: Parameters outside of projection modules that can have adapters: dotted names inside a block, by the
            names for `lora.targets`. A parameter gets an adapter only if `lora.targets` names the parameter.

    Example:
        >>> FAMILIES["gpt2"].targets
        ('c_attn', 'c_proj', 'c_fc')
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
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    narrows: tuple[str, ...] = ()
    layers_key: str = "num_hidden_layers"
    positions_key: str = "max_position_embeddings"
    width_key: str = "hidden_size"
    cap_key: str | None = None
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outgrows: str | None = None
    required: Mapping[str, object] = field(default_factory=dict)
    router: str | None = None
    experts: int | None = None
    sparse: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)

    def asked(self, targets: Sequence[str]) -> list[str]:
        """Returns the targets that are keys of `parameters`.

        Example:
            >>> FAMILIES["mixtral"].asked(["q_proj", "gate"])
            ['gate']
        """
        return [name for name in targets if name in self.parameters]


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

_LLAMA = Family(
    decoder="model",
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    targets=(*_ATTENTION, "gate_proj", "up_proj", "down_proj"),
    narrows=("down_proj",),
    rotary="rotary_emb",
)

_QK = (*_LLAMA.norms, "q_norm", "k_norm")
_AROUND = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

STACKED = ("gate_up_proj", "down_proj")
"""Names of the experts' matrices, each one parameter (E, out, in), in the order of the library's modules."""

_EXPERTS = replace(
    _LLAMA,
    targets=_ATTENTION,
    router="mlp.gate",
    experts=128,
    parameters={**{name: f"mlp.experts.{name}" for name in STACKED}, "gate": "mlp.gate.weight"},
)

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
        norms=("ln_1", "ln_2"),
        narrows=("mlp.c_proj",),
        layers_key="n_layer",
        positions_key="n_positions",
        width_key="n_embd",
        required={"add_cross_attention": False},  # cross-attention would need an encoder
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, norms=_QK),
    "gemma2": replace(_LLAMA, norms=(*_LLAMA.norms, *_AROUND), cap_key="final_logit_softcapping"),
    "gemma3_text": replace(_LLAMA, norms=(*_QK, *_AROUND), cap_key="final_logit_softcapping"),
    "phi3": replace(
        _LLAMA,
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        outgrows="original_max_position_embeddings",
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        blocks="layers",
        embedding="embed_in",
        norm="final_layer_norm",
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        narrows=("dense_4h_to_h",),
        dropout="emb_dropout",
        rotary="rotary_emb",
        stored={"lm_head.weight": ("embed_out.weight",)},
    ),
    "opt": Family(
        decoder="model.decoder",
        blocks="layers",
        embedding="embed_tokens",
        norm="final_layer_norm",
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        narrows=("fc2",),
        positions="embed_positions",
        required={"word_embed_proj_dim": "hidden_size", "layerdrop": 0},
    ),
    "mixtral": replace(
        _EXPERTS,
        experts=8,
        stored={
            "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
            "mlp.experts.gate_up_proj": (
                "block_sparse_moe.experts.*.w1.weight",
                "block_sparse_moe.experts.*.w3.weight",
            ),
            "mlp.experts.down_proj": ("block_sparse_moe.experts.*.w2.weight",),
        },
    ),
    "qwen3_moe": replace(
        _EXPERTS,
        sparse=True,
        norms=_QK,
        stored={
            "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
            "mlp.experts.down_proj": ("mlp.experts.*.down_proj.weight",),
        },
    ),
}


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
    """

    family: Family
    blocks: int
    positions: int
    end: int
    width: int = 0
    experts: int = 0
    routed: tuple[int, ...] = ()
    router_aux_loss: float = 0.0

    def coefficient(self, asked: float) -> float:
        """Returns the coefficient of the auxiliary loss.

        Args:
            asked: The setting. Below 0, the value in config.json counts.
        """
        return self.router_aux_loss if asked < 0 else asked


def family_of(model_type: str) -> Family:
    """Returns the record of a family.

    Args:
        model_type: The `model_type` of config.json.

    Raises:
        SettingError: No family has the type.

    Example:
        >>> family_of("gpt2").blocks
        'h'
    """
    if model_type not in FAMILIES:
        needed = ", ".join(entry.name for entry in fields(Family) if _is_needed(entry))
        also = ", ".join(entry.name for entry in fields(Family) if not _is_needed(entry))
        allowed = (
            f"a model of type {' | '.join(FAMILIES)} (another type needs a record in fedsplit/model/families.py,"
            f" which names its {needed}, and where they are not the usual, {also})"
        )
        raise SettingError("model", f"a model of type {model_type}", allowed)
    return FAMILIES[model_type]


_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}
"""Required of every family. If a token attended to later tokens, the next token would be no target of training."""


def _is_needed(entry: Field[object]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _check_required(family: Family, document: Mapping[str, Any], allowed: str) -> None:
    """Refuses a model that cannot be split exactly.

    Raises:
        SettingError: A key of config.json has a value that the family does not allow.
    """
    for key, required in {**_CAUSAL, **family.required}.items():
        value = document.get(key)
        if value is None:
            continue
        if isinstance(required, str):
            expected = document.get(required)
            described = f"{required}, {expected}"
        else:
            expected = required
            described = json.dumps(required)
        if value != expected:
            raise SettingError("model", f"{key} {json.dumps(value)} in config.json", f"{described}; {allowed}")


def read_facts(path: Path) -> Facts:
    """Reads the config.json of a checkpoint, and the files that may name the end token.

    Args:
        path: Folder of the checkpoint.

    Raises:
        SettingError: The folder holds no model, the family is unknown, the model cannot be split, or no file has the
            token that ends a text.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> facts = read_facts(BUNDLED_MODEL)
        >>> facts.blocks, facts.positions, facts.width
        (6, 256, 128)
    """
    allowed = "a model with a config.json that says what its family needs"
    document = _read_document(path, allowed)
    family = family_of(str(document.get("model_type")))
    _check_required(family, document, allowed)
    numbers = []  # of blocks and of positions
    for key in (family.layers_key, family.positions_key):
        value = document.get(key)
        if not _is_whole(value) or value < 1:
            raise SettingError("model", f"{path} (its config.json has no possible {key})", allowed)
        numbers.append(value)
    blocks, positions = numbers
    width = document.get(family.width_key)
    experts = _read_experts(family, document, blocks, path, allowed)
    return Facts(
        family,
        blocks,
        positions,
        end=end_token(path),
        width=width if _is_whole(width) else 0,
        **experts,
    )


def _is_whole(value: Any) -> TypeGuard[int]:
    """Returns True for a whole number. JSON's true is a number to Python, and no size of a model."""
    return isinstance(value, int) and not isinstance(value, bool)


def _read_document(path: Path, allowed: str) -> Mapping[str, Any]:
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
    if isinstance(document.get("text_config"), dict):
        kind = f"a model of type {document.get('model_type')}, whose text model is nested in it"
        raise SettingError("model", kind, "a text model alone, such as what gemma3_text is of gemma3")
    if document.get("quantization_config"):  # the scales of the weights would be ignored
        unquantised = "weights in fp32, bf16 or fp16; --quantization takes them down to fewer bits here"
        raise SettingError("model", f"{path} (its weights are quantised already)", unquantised)
    weight_file = document.get("transformers_weights")
    if weight_file is not None:  # transformers would load the named file only
        reason = f"its config.json has the transformers_weights {json.dumps(weight_file)}"
        raise SettingError("model", f"{path} ({reason})", "a model without it, whose weights have the usual names")
    return document


_UNSAID = {"decoder_sparse_step": 1, "router_aux_loss_coef": 0.001}
"""The library's defaults for keys that the config.json of a mixture of experts may lack."""


def _read_experts(family: Family, document: Mapping[str, Any], blocks: int, path: Path, allowed: str) -> dict[str, Any]:
    """Reads the facts about a mixture of experts, by the names in `Facts`. Empty for a family without experts.

    Raises:
        SettingError: config.json has an impossible number of experts, step or coefficient.
    """
    if family.experts is None:
        return {}
    # The library takes either key.
    count_key = "num_local_experts" if "num_local_experts" in document else "num_experts"
    numbers = {}
    for key, default in {count_key: family.experts, **_UNSAID}.items():
        value = document.get(key, default)
        least = 1 if key == "decoder_sparse_step" else 0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value < math.inf:
            raise SettingError("model", f"{path} (its config.json has no possible {key})", allowed)
        numbers[key] = value

    experts = int(numbers[count_key])
    routed = tuple(range(blocks)) if experts else ()
    if family.sparse:
        dense = document.get("mlp_only_layers") or []
        step = int(numbers["decoder_sparse_step"])
        routed = tuple(block for block in routed if block not in dense and (block + 1) % step == 0)

    balances = routed and document.get("output_router_logits")
    coefficient = float(numbers["router_aux_loss_coef"]) if balances else 0.0
    return {"experts": experts, "routed": routed, "router_aux_loss": coefficient}


def read_pad(path: Path, end: int) -> int:
    """Returns the padding token of a model: from config.json if the value is possible, else the end token.

    Padding is masked, so the choice changes no number.

    Args:
        path: Folder of the checkpoint.
        end: Id of the token that ends a text.
    """
    document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    pad = document.get("pad_token_id")
    size = document.get("vocab_size")
    if not _is_whole(pad) or pad < 0:
        return end
    if isinstance(size, int) and pad >= size:  # the embedding has no row for the token
        return end
    return int(pad)
