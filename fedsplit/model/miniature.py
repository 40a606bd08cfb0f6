"""Configurations of small models that have the class and the switches of a large one.

A miniature has few, narrow blocks. Everything else stays: the class, the kinds of blocks, the position embeddings, the
multipliers, the caps, the norms, the routers. So what is found out about the miniature's code is true of the large
model's code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from fedsplit.errors import SettingError, one_line
from fedsplit.model.sharing import READS, sharing_of

BLOCKS = 4
"""Usual number of blocks of a miniature."""

_MOST_BLOCKS = 8
"""Largest number of blocks of a miniature, for a model with more than four kinds of blocks."""

VOCABULARY = 128
"""Number of tokens of a miniature."""

_WIDTH = 64
_HEADS = 4
_HEAD_WIDTH = 16
_MIDDLE_WIDTH = 96

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
"""Names of the number of blocks."""

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "attention_hidden_size", "model_dim"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "d_head"), _HEAD_WIDTH),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "qk_head_dim", "v_head_dim", "index_head_dim"), _HEAD_WIDTH),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "d_state", "mamba_d_state", "laurel_rank"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "index_topk", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    "q_lora_rank": 24,
    "mamba_d_ssm": 2 * _WIDTH,
    "ffn_hidden_size": 4 * _WIDTH,
}
"""Sizes in a miniature, by their names in config.json."""

_MIDDLES = ("ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "block_ff_dim")
"""Names of the width inside an MLP, beside the names that contain `intermediate`."""

_KEY_HEADS = ("num_key_value_heads", "num_global_key_value_heads", "num_kv_heads", "n_head_kv")

_LIMITS: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("zero_expert_num", "moe_layer_start_index"), 2),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "decoder_sparse_step", "rescale_every"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "local_attention"), 5),
    **dict.fromkeys(("attention_window_size", "sliding_window_size"), 5),
}
"""Upper limits of sizes in a miniature. Windows are shorter than the texts of a proof, and periods shorter than the
miniature, so that both matter."""

_NUMBERS = re.compile(r"layer_indices|layers|attn_idxs|layer_ids")
"""Matches the end of a name of block numbers, such as `attn_layer_indices` and `mlp_only_layers`."""

BOOKKEEPING = (
    "quantization_config",
    "architectures",
    "transformers_version",
    "model_type",
    "dtype",
    "torch_dtype",
    "_name_or_path",
)
"""Names of values in a configuration that have no influence on what the model computes."""


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """Returns the configuration of a small model of the same class, with the same switches.

    Args:
        config: Configuration of a causal language model.

    Raises:
        SettingError: The library refuses the small sizes for this class.

    Example:
        >>> from transformers import LlamaConfig
        >>> small = miniature(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, attention_bias=True))
        >>> small.hidden_size, small.num_hidden_layers, small.num_key_value_heads, small.attention_bias
        (64, 4, 2, True)
    """
    document = {key: value for key, value in config.to_dict().items() if key not in BOOKKEEPING}
    depth = next((document[key] for key in DEPTHS if isinstance(document.get(key), int)), 0)
    try:
        modes = sharing_of(config)
        kept = _kept_blocks(document, depth, modes)
        small = {}
        for key, value in document.items():
            small[key] = _small(key, value, document, depth, kept)
        _fit_together(small, config)
        if modes:
            small["num_kv_shared_layers"] = sum(modes[block] == READS for block in kept)
        return type(config)(**small)
    except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
        kind = f"a model of type {config.model_type}, of which no small copy can be made ({one_line(error)})"
        raise SettingError("model", kind, "a model of another type") from None


def identity_of(config: PretrainedConfig) -> str:
    """Returns a text that is equal for configurations of models that compute the same, given the same weights.

    Args:
        config: Configuration of a causal language model.

    Example:
        >>> from transformers import LlamaConfig, MistralConfig
        >>> identity_of(LlamaConfig()) == identity_of(LlamaConfig(architectures=["LlamaForCausalLM"]))
        True
        >>> identity_of(LlamaConfig()) == identity_of(MistralConfig())
        False
    """
    values = {name: value for name, value in config.to_dict().items() if name not in BOOKKEEPING}
    return f"{config.model_type} {sorted(values.items())!r}"


def is_per_block(key: str, value: object, depth: int) -> bool:
    """Returns whether a value of a configuration is a list with an entry for each block.

    Args:
        key: Name of the value.
        value: The value.
        depth: Number of blocks.
    """
    if not isinstance(value, list | tuple) or len(value) != depth or depth < 1:
        return False
    # A list of token ids, of sections of a rotary embedding or of classes may happen to have the same length.
    return "token" not in key and "section" not in key and key not in ("architectures", "labels")


def is_of_numbers(key: str, value: object, depth: int) -> bool:
    """Returns whether a value of a configuration is a list of block numbers.

    Args:
        key: Name of the value.
        value: The value.
        depth: Number of blocks.

    Example:
        >>> is_of_numbers("attn_layer_indices", [9, 18], 24), is_of_numbers("no_rope_layers", [1, 1, 0, 1], 4)
        (True, False)
    """
    if not isinstance(value, list | tuple) or not value or not re.search(rf"({_NUMBERS.pattern})$", key):
        return False
    are_numbers = all(type(number) is int and 0 <= number < depth for number in value)
    return are_numbers and list(value) == sorted({*value})


def _kept_blocks(document: Mapping[str, Any], depth: int, modes: Sequence[str | None]) -> list[int]:
    """Returns numbers of blocks, so that each kind of block appears among them.

    Args:
        document: Configuration of the large model.
        depth: Number of blocks of the large model.
        modes: For each block, whether it stores or reads shared keys and values (`sharing_of`).
    """
    lists = [value for key, value in document.items() if is_per_block(key, value, depth)]
    lists = [values for values in lists if len({*map(repr, values)}) < depth]  # else numbers of blocks, not kinds
    numbers = [value for key, value in document.items() if is_of_numbers(key, value, depth)]
    owns = by_block(document.get("per_layer_config") or {})
    firsts: dict[str, int] = {}
    for block in range(depth):
        mode = modes[block] if modes else None
        chosen = [block in values for values in numbers]
        in_lists = [values[block] for values in lists]
        kind = repr([*in_lists, chosen, owns.get(block), mode])
        firsts.setdefault(kind, block)
    if modes:  # the library wants a last block of a certain kind in models that share keys and values
        firsts["last"] = depth - 1
    kept = list(dict.fromkeys(firsts.values()))[:_MOST_BLOCKS]
    for block in range(min(depth, _MOST_BLOCKS)):
        if len(kept) < min(BLOCKS, depth) and block not in kept:
            kept.append(block)
    return sorted(kept)


def _small(
    key: str,
    value: Any,
    document: Mapping[str, Any],
    depth: int,
    kept: Sequence[int],
) -> Any:
    """Returns a value of the miniature's configuration.

    Args:
        key: Name of the value.
        value: Value in the large model.
        document: Configuration of the large model, or of one of its blocks.
        depth: Number of blocks of the large model.
        kept: Blocks of the large model that the miniature copies.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in DEPTHS and is_number:
        return len(kept)
    if is_of_numbers(key, value, depth):
        return [number for number, block in enumerate(kept) if block in value]
    if is_per_block(key, value, depth):
        values = [value[block] for block in kept]
        return [_MIDDLE_WIDTH] * len(kept) if "intermediate" in key else values
    if key.endswith("token_id") or key.endswith("token_ids"):
        return _small_ids(value)
    if key in ("rope_parameters", "rope_scaling"):
        return _small_rotary(value, document.get("partial_rotary_factor") or 1.0)
    if key == "per_layer_config" and isinstance(value, dict):
        return _small_per_block(value, depth, kept)
    if value is None and key in ("head_dim", *_KEY_HEADS):  # some of the library's classes have no default of use
        return _HEAD_WIDTH if key == "head_dim" else 2
    if not is_number or value == 0:  # a size of 0 is a switch
        return value
    if key in _KEY_HEADS:
        heads = document.get("num_attention_heads", document.get("n_head", value))
        # The kind of attention is kept: keys for each head, keys for all heads together, or keys for groups of heads.
        return {heads: _HEADS, 1: 1}.get(value, 2)
    if "intermediate" in key or key in _MIDDLES:
        return _MIDDLE_WIDTH
    if key in _SIZES:
        return _SIZES[key]
    return min(value, _LIMITS.get(key, value))


def by_block(owns: Mapping[Any, Any]) -> dict[int, dict[str, Any]]:
    """Returns settings of single blocks by number. The library writes numbers as text, such as "05"."""
    return {int(block): dict(own) for block, own in owns.items()}


def _small_per_block(value: Mapping[Any, Any], depth: int, kept: Sequence[int]) -> dict[int, Any]:
    """Returns the settings of single blocks, by the numbers of the miniature's blocks.

    Args:
        value: Settings by the number of the block in the large model.
        depth: Number of blocks of the large model.
        kept: Blocks of the large model that the miniature copies.
    """
    owns = by_block(value)
    small = {}
    for number, block in enumerate(kept):
        own = owns.get(block)
        if own is not None:
            small[number] = {key: _small(key, one, own, depth, kept) for key, one in own.items()}
            if "head_dim" in own:  # another width than in the other blocks, as in the large model
                small[number]["head_dim"] = 2 * _HEAD_WIDTH
    return small


def _small_ids(value: Any) -> Any:
    """Returns a token id, or a list of them, inside the miniature's vocabulary."""
    if isinstance(value, list):
        return [_small_ids(one) for one in value]
    return 1 if isinstance(value, int) and value >= VOCABULARY else value


def _small_rotary(value: Any, share: float) -> Any:
    """Returns parameters of a rotary embedding for the miniature's heads.

    Args:
        value: Parameters in the large model.
        share: Rotated share of a head.
    """
    if not isinstance(value, dict):
        return value
    small = {key: _small_rotary(one, share) for key, one in copy.deepcopy(value).items()}
    pairs = int(_HEAD_WIDTH * small.get("partial_rotary_factor", share)) // 2
    for key in ("short_factor", "long_factor"):
        # The library wants one factor for each rotated pair of a head.
        if isinstance(small.get(key), list) and small[key]:
            small[key] = (small[key] * pairs)[:pairs]
    if small.get("mrope_section"):
        # Together the 8 pairs of a head that is `_HEAD_WIDTH` wide.
        small["mrope_section"] = [2, 3, 3]
    return small


def _fit_together(small: dict[str, Any], config: PretrainedConfig) -> None:
    """Mends sizes that depend on each other.

    Args:
        small: Values of the miniature's configuration. The call changes them.
        config: Configuration of the large model.
    """
    large = config.to_dict()
    rotary = large.get("qk_rope_head_dim")
    if rotary and large.get("head_dim") == rotary:  # the name stands for the rotary part of a head
        small["head_dim"] = _SIZES["qk_rope_head_dim"]
    if "qk_head_dim" in small and "qk_nope_head_dim" in small:
        small["qk_head_dim"] = _SIZES["qk_rope_head_dim"] + _SIZES["qk_nope_head_dim"]
    if "expand" in small and "num_heads" in small and "head_dim" in small:  # a state-space block of that many heads
        small["num_heads"] = int(small["expand"]) * _WIDTH // _HEAD_WIDTH
    if isinstance(large.get("word_embed_proj_dim"), int):
        is_same = large["word_embed_proj_dim"] == large["hidden_size"]
        small["word_embed_proj_dim"] = _WIDTH if is_same else _WIDTH // 2
