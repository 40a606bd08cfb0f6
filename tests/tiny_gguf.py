"""A tiny Llama as a GGUF file, written as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from conftest import BLOCKS, VOCABULARY

from fedsplit.model.unsplit import load_unsplit

END = "<|endoftext|>"
TOKENS = [END, *map(chr, range(33, 126)), "Ġ", "Ċ", "th"]
"""As byte-level tokenizers spell them: Ġ is a space, Ċ a new line."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
"""What llama.cpp calls the pieces of a parameter's name."""

HEADS = {"attn_q": 4, "attn_k": 2}


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in pairs, as llama.cpp turns them by the rotary angle."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def _describe(writer: Any) -> None:
    for name, value in {
        "context_length": 32,
        "embedding_length": 32,
        "block_count": BLOCKS,
        "feed_forward_length": 64,
        "rope_dimension_count": 8,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-6,
        "rope_freq_base": 10000.0,
        "tokenizer_model": "gpt2",
        "token_list": TOKENS,
        "token_types": [3, *[1] * (VOCABULARY - 1)],
        "token_merges": ["t h"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }.items():
        getattr(writer, f"add_{name}")(value)


def write_gguf(
    file: Path, model: Path, kind: str = "F32", architecture: str = "llama", without: Collection[str] = ()
) -> Path:
    """Writes a GGUF file.

    Args:
        file: Where.
        model: The folder of the tiny Llama.
        kind: How matrices are stored, as gguf names it.
        architecture: What the file says it is.
        without: Tensors to leave out.
    """
    assert len(TOKENS) == VOCABULARY
    writer = gguf.GGUFWriter(file, architecture)
    _describe(writer)
    for name, parameter in load_unsplit(model).state_dict().items():
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        weight = parameter.numpy()
        for piece, heads in HEADS.items():
            weight = _permuted(weight, heads) if f".{piece}." in name else weight
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        if name not in without:
            writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
