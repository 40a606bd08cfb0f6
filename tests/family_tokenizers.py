"""Small tokenizers of the kinds that the families have, and what checkpoints in use store beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "the people of the states and the peace of the world",
    "a question, its answer: yes or no? 1 + 1 = 2.",
    "user assistant system says hello to the others\n\nand\tgoes on",
]


def _byte_level(special: list[str], pattern: str = "") -> Tokenizer:
    """Byte pairs as GPT-2 has them, or with another pattern."""
    tokenizer = Tokenizer(models.BPE())
    if pattern:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 9, trainer)
    return tokenizer


def _pieces(special: list[str], before: bool) -> Tokenizer:
    """Byte pairs as SentencePiece has them, with a space put before every text, or not."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("▁")] if before else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if before else [])])
    tokens = ["<unk>", *special, *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 9, trainer)
    return tokenizer


def _begun(tokenizer: Tokenizer, bos: str, eos: str = "") -> Tokenizer:
    """Lets a tokenizer add BOS before every text, and EOS behind it if there is one."""
    names = [bos, eos] if eos else [bos]
    single = " ".join([bos, "$A", *names[1:]])
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    template = processors.TemplateProcessing(single=single, special_tokens=tokens)
    if isinstance(tokenizer.post_processor, processors.ByteLevel):
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    else:
        tokenizer.post_processor = template
    return tokenizer


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]

Made = tuple[Tokenizer, dict[str, Any], str]
"""A tokenizer, its tokenizer_config.json and its end token."""


def _named(kind: str, eos: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer_class": kind, "eos_token": eos, **more}


def _padded(made: Tokenizer, to: int, pad: str) -> Tokenizer:
    """Stores a padding and a truncation in tokenizer.json, as some that were trained with them do."""
    made.enable_padding(length=to, pad_id=made.token_to_id(pad), pad_token=pad)
    made.enable_truncation(5)
    return made


def _marked(made: Tokenizer, *names: str) -> Tokenizer:
    made.add_special_tokens([AddedToken(name, special=True, rstrip=True, normalized=False) for name in names])
    return made


KINDS: dict[str, Callable[[], Made]] = {
    "gpt2": lambda: (_byte_level(["<|endoftext|>"]), _named("GPT2Tokenizer", "<|endoftext|>"), "<|endoftext|>"),
    "gpt2 with a space before": lambda: (
        _byte_level(["<|endoftext|>"]),
        _named("GPT2Tokenizer", "<|endoftext|>", add_prefix_space=True),
        "<|endoftext|>",
    ),
    "gpt2 with a stored padding": lambda: (
        _padded(_byte_level(["<|endoftext|>"]), 40, "<|endoftext|>"),
        _named("TokenizersBackend", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    "a token named beside it": lambda: (
        _byte_level(["<|endoftext|>"]),
        _named("TokenizersBackend", "<|endoftext|>", additional_special_tokens=["<|turn|>"]),
        "<|endoftext|>",
    ),
    "llama": lambda: (
        _begun(_pieces(["<s>", "</s>"], True), "<s>"),
        _named("TokenizersBackend", "</s>", bos_token="<s>", unk_token="<unk>"),
        "</s>",
    ),
    "llama as its own class": lambda: (
        _begun(_pieces(["<s>", "</s>"], True), "<s>"),
        _named("LlamaTokenizer", "</s>", bos_token="<s>", unk_token="<unk>", add_bos_token=True),
        "</s>",
    ),
    "llama3": lambda: (
        _begun(_byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], QWEN), "<|begin_of_text|>"),
        _named("TokenizersBackend", "<|end_of_text|>", bos_token="<|begin_of_text|>"),
        "<|end_of_text|>",
    ),
    "mistral": lambda: (
        _begun(_pieces(["<s>", "</s>", "[INST]", "[/INST]"], True), "<s>"),
        _named("TokenizersBackend", "</s>", bos_token="<s>", unk_token="<unk>"),
        "</s>",
    ),
    "mixtral": lambda: (
        _begun(_pieces(["<s>", "</s>"], True), "<s>", "</s>"),
        _named("TokenizersBackend", "</s>", bos_token="<s>", unk_token="<unk>"),
        "</s>",
    ),
    "qwen": lambda: (_byte_level(CHATML, QWEN), _named("Qwen2Tokenizer", "<|im_end|>"), "<|im_end|>"),
    "gemma": lambda: (
        _begun(_pieces(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], False), "<bos>"),
        _named("GemmaTokenizer", "<eos>", bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"),
        "<eos>",
    ),
    "phi3": lambda: (
        _marked(_pieces(["<s>", "</s>"], True), "<|user|>", "<|assistant|>", "<|end|>"),
        _named("TokenizersBackend", "<|end|>", bos_token="<s>", unk_token="<unk>"),
        "<|end|>",
    ),
    "gpt_neox": lambda: (_byte_level(["<|endoftext|>"]), _named("GPTNeoXTokenizer", "<|endoftext|>"), "<|endoftext|>"),
    "opt": lambda: (
        _begun(_byte_level(["<pad>", "</s>"]), "</s>"),
        _named("GPT2Tokenizer", "</s>", bos_token="</s>", add_bos_token=True),
        "</s>",
    ),
}
"""What makes a tokenizer, by its kind."""


def write_tokenizer(folder: Path, kind: str, template: str = "") -> int:
    """Saves a tokenizer in a model's folder, and names its end token in config.json.

    Args:
        folder: The folder.
        kind: One of `KINDS`.
        template: The chat template.

    Returns:
        The id of the end token.
    """
    tokenizer, facts, eos = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | ({"chat_template": template} if template else {})))
    end: int = tokenizer.token_to_id(eos)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": end}))
    return end
