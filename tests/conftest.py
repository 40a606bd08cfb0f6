"""Tiny random models, and what several tests need of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

# Tests run in several processes: more threads than cores make each of them several times slower.
torch.set_num_threads(1)

# A slow machine is no failure.
settings.register_profile("fedsplit", deadline=None)
settings.load_profile("fedsplit")

# Flower's messages name the run they belong to; its engine sets this.
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

VOCABULARY = 97
BLOCKS = 3

CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=BLOCKS,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        # Depends on the number of the block in the whole model: a part that counts from 0 would be found out.
        scale_attn_by_inverse_layer_idx=True,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def write_model(folder: Path, family: str) -> Path:
    """Saves a tiny random model and a tokenizer of characters."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():  # the library's initialisation is so small that wrong wiring would hardly show
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    characters = {chr(32 + number): number for number in range(VOCABULARY - 1)} | {"\n": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family."""
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in CONFIGS}


@pytest.fixture(params=list(CONFIGS))
def model_path(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    """Each family's folder in turn."""
    return tiny_models[request.param]


def write_corpus(path: Path) -> Path:
    """Writes a small corpus of three owners."""
    rows = [
        {"text": f"{owner} wrote text number {number}. " * 6, "owner": owner}
        for owner in ("ann", "bob", "cid")
        for number in range(5)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A small corpus of three owners."""
    return write_corpus(tmp_path / "corpus.jsonl")


@pytest.fixture(scope="session")
def finished_run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes finished runs of a model, a strategy and other settings; each only once."""
    from finished_runs import Runs

    return Runs(tiny_models, tmp_path_factory.mktemp("runs"))


def without_dropout(part: torch.nn.Module) -> None:
    """Switches off the base model's own dropout; the adapters' is a setting."""
    for name, module in part.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in name:
            module.p = 0.0
