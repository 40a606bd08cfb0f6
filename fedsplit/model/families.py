"""Where each model family keeps its embedding, blocks, norm and head.

A record is all the family-specific code there is: `split` builds every part from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fedsplit.allowed import SettingError
from fedsplit.model.token_ids import end_token


@dataclass(frozen=True)
class Family:
    """Attribute names inside the library's own model classes.

    Attributes:
        decoder: The decoder within the causal LM, dotted where it is nested; its prefix in checkpoints.
        blocks: The list of blocks within the decoder.
        embedding: The token embedding within the decoder.
        norm: The final norm within the decoder; it may be None there.
        positions: The learned position embedding within the decoder, if there is one.
        dropout: The dropout after the embedding within the decoder, if there is one.
        rotary: The rotary position module within the decoder, if there is one.
        targets: Attention and MLP projections, by the last part of their names.
        transposed: Whether those projections are `Conv1D`, which store (in, out).
        norms: The norms in a block, by the ends of their names.
        narrows: The MLP's projections back to the hidden size, by the ends of their names.
        layers_key: What the checkpoint's config.json calls the number of blocks.
        positions_key: What it calls the longest sequence.
        width_key: What it calls the size of a hidden state.
        cap_key: What it calls the cap of the logits, if the family has one.
        stored: What checkpoints call parameters, or the pieces of them, where it is not the library's name; both by
            the ends of the names. For `*` the numbers of experts are put in, whose tensors are stacked; pieces are
            joined by their rows.
        outgrows: What config.json calls the length beyond which positions are turned otherwise, where the library
            then computes a text anew that has grown past it.
        required: What config.json must say, if it says anything: a value, or the key that has the same one. Anything
            else would not be the unsplit model.
        router: The router within a block with experts, if the family has such blocks.
        experts: How many each of those has where config.json does not say.
        sparse: Whether config.json may leave blocks without experts (`mlp_only_layers`, `decoder_sparse_step`).
        parameters: What has no module of its own and can have an adapter all the same, by the name that a setting
            calls it by: its dotted name within a block. Adapters sit there only where they are asked for.
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
        """Of the names of targets, those that stand for bare parameters."""
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
"""The experts' matrices, each (E, out, in) in one parameter, in the order in which the library's modules have them."""

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
        required={"add_cross_attention": False},  # there is no encoder, and adapters on it would get no gradient
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
    """What the files beside a checkpoint say before anything is loaded.

    Attributes:
        family: The family's record.
        blocks: Number of blocks.
        positions: Longest sequence in tokens.
        end: Id of the token that ends a text (`fedsplit.model.token_ids.end_token`).
        width: The size of a hidden state; 0 where config.json does not say.
        experts: Experts of each block that has any.
        routed: The blocks that have experts.
        router_aux_loss: The coefficient of the auxiliary loss of their routers, as the unsplit model has it.
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
        """The coefficient of the auxiliary loss, given the setting; below 0 the unsplit model's own holds."""
        return self.router_aux_loss if asked < 0 else asked


def family_of(model_type: str) -> Family:
    """Looks a family up.

    Raises:
        SettingError: There is no record for it.
    """
    if model_type not in FAMILIES:
        needed = ", ".join(entry.name for entry in fields(Family) if _is_needed(entry))
        also = ", ".join(entry.name for entry in fields(Family) if not _is_needed(entry))
        words = (
            f"a model of type {' | '.join(FAMILIES)} (another type needs a record in fedsplit/model/families.py,"
            f" which names its {needed}, and where they are not the usual, {also})"
        )
        raise SettingError("model", f"a model of type {model_type}", words)
    return FAMILIES[model_type]


_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}
"""Of every family: a token that saw later ones would be no target, and padding of joined batches would be seen."""


def _is_needed(entry: Any) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _check_required(family: Family, document: Mapping[str, Any], allowed: str) -> None:
    """Refuses a model that the family's code would not split exactly."""
    for key, wanted in {**_CAUSAL, **family.required}.items():
        expected = document.get(wanted) if isinstance(wanted, str) else wanted
        if (value := document.get(key)) is not None and value != expected:
            words = f"{wanted}, {expected}" if isinstance(wanted, str) else json.dumps(wanted)
            raise SettingError("model", f"{key} {json.dumps(value)} in config.json", f"{words}; {allowed}")


def read_facts(path: Path) -> Facts:
    """Reads a checkpoint's config.json, and the files that may name its end token.

    Raises:
        SettingError: There is no such folder, it holds no model, its family is unknown, it has something that cannot
            be split, or nothing says which token ends a text.
    """
    allowed = "a model with a config.json that says what its family needs"
    try:
        document: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = {}
    if not isinstance(document, dict) or not document:
        raise SettingError("model", path, allowed)
    if isinstance(document.get("text_config"), dict):
        kind = f"a model of type {document.get('model_type')}, whose text model is nested in it"
        raise SettingError("model", kind, "a text model alone, such as what gemma3_text is of gemma3")
    if document.get("quantization_config"):  # their scales would be passed over
        words = "weights in fp32, bf16 or fp16; --quantization takes them down to fewer bits here"
        raise SettingError("model", f"{path} (its weights are quantised already)", words)
    if (named := document.get("transformers_weights")) is not None:  # transformers would load this file alone
        words = "a model without it, whose weights have the usual names"
        raise SettingError("model", f"{path} (its config.json has the transformers_weights {json.dumps(named)})", words)
    family = family_of(str(document.get("model_type")))
    _check_required(family, document, allowed)
    numbers = []
    for key in (family.layers_key, family.positions_key):
        value = document.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError("model", f"{path} (its config.json has no possible {key})", allowed)
        numbers.append(value)
    blocks, positions = numbers
    end = end_token(path)
    width = document.get(family.width_key)
    width = width if isinstance(width, int) and not isinstance(width, bool) else 0
    return Facts(family, blocks, positions, end, width, **_read_experts(family, document, blocks, path, allowed))


_UNSAID = {"decoder_sparse_step": 1, "router_aux_loss_coef": 0.001}
"""What the library takes where config.json of a mixture of experts does not say."""


def _read_experts(family: Family, document: Mapping[str, Any], blocks: int, path: Path, allowed: str) -> dict[str, Any]:
    """What config.json says of a mixture of experts, by the names of `Facts`.

    Raises:
        SettingError: It has no possible number of experts, or coefficient.
    """
    if family.experts is None:
        return {}
    number = "num_local_experts" if "num_local_experts" in document else "num_experts"  # the library takes either
    found = {number: family.experts, **_UNSAID}
    for key in found:
        value = found[key] = document.get(key, found[key])
        least = 1 if key == "decoder_sparse_step" else 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise SettingError("model", f"{path} (its config.json has no possible {key})", allowed)
    experts, coefficient = int(found[number]), float(found["router_aux_loss_coef"])
    dense = document.get("mlp_only_layers") or []
    routed = tuple(block for block in range(blocks) if experts)
    if family.sparse:
        step = int(found["decoder_sparse_step"])
        routed = tuple(block for block in routed if block not in dense and (block + 1) % step == 0)
    wanted = routed and document.get("output_router_logits")
    return {"experts": experts, "routed": routed, "router_aux_loss": coefficient if wanted else 0.0}


def read_pad(path: Path, end: int) -> int:
    """The token that fills up shorter sequences: what config.json says, else the end token; it is masked either way.

    Args:
        path: The checkpoint's folder.
        end: The id of the token that ends a text.
    """
    document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    pad, size = document.get("pad_token_id"), document.get("vocab_size")
    possible = isinstance(pad, int) and not isinstance(pad, bool) and pad >= 0
    return pad if possible and (not isinstance(size, int) or pad < size) else end
