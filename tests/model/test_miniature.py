"""Small configurations with the switches of large ones."""

from __future__ import annotations

import pytest
from conftest import CONFIGS
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma2Config,
    JambaConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    RwkvConfig,
)

from fedsplit.errors import SettingError
from fedsplit.model.miniature import is_per_block, miniature


@pytest.mark.parametrize("name", CONFIGS)
def test_a_miniature_is_a_small_model_of_the_class(name: str) -> None:
    small = miniature(CONFIGS[name]())
    model = AutoModelForCausalLM.from_config(small)
    assert type(small) is type(CONFIGS[name]())
    assert model.num_parameters() < 1e6


def test_switches_stay() -> None:
    large = LlamaConfig(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu")
    small = miniature(large)
    for switch in ("attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act", "rms_norm_eps"):
        assert getattr(small, switch) == getattr(large, switch)
    assert (miniature(LlamaConfig(num_key_value_heads=32)).num_key_value_heads, small.num_key_value_heads) == (4, 4)
    assert miniature(LlamaConfig(num_key_value_heads=1)).num_key_value_heads == 1


def test_every_kind_of_block_stays() -> None:
    """Also where the second kind comes late."""
    kinds = ["sliding_attention"] * 20 + ["full_attention"] * 6
    small = miniature(Gemma2Config(layer_types=kinds))
    assert small.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    assert small.sliding_window == 5  # shorter than the texts of a proof


def test_experts_stay_and_become_few() -> None:
    small = miniature(Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, mlp_only_layers=[1]))
    assert (small.num_experts, small.num_experts_per_tok, small.mlp_only_layers) == (8, 2, [1])


def test_lists_of_tokens_are_not_lists_of_blocks() -> None:
    assert is_per_block("layer_types", ["a", "b"], 2)
    assert not is_per_block("eos_token_id", [1, 2], 2)
    assert not is_per_block("layer_types", ["a", "b"], 3)


def test_a_class_that_refuses_small_sizes_is_named() -> None:
    class Stubborn(PretrainedConfig):
        model_type = "stubborn"

        def __init__(self, hidden_size: int = 4096, **rest: object) -> None:
            if hidden_size < 4096:
                raise ValueError("a width of 4096 or more:\n  not less")
            super().__init__(hidden_size=hidden_size, **rest)

    with pytest.raises(SettingError, match=r"type stubborn, of which no small copy can be made \(a width of 4096"):
        miniature(Stubborn())


def test_block_numbers_become_those_of_the_kept_blocks() -> None:
    small = miniature(BambaConfig(num_hidden_layers=32, attn_layer_indices=[9, 18, 27]))
    assert small.attn_layer_indices == [3]  # blocks 0, 1, 2 and 9
    assert small.layers_block_type == ["linear_attention"] * 3 + ["full_attention"]


def test_periods_are_shorter_than_the_miniature() -> None:
    """Else blocks that come late would not be there, and what happens late would not happen."""
    assert miniature(JambaConfig(num_hidden_layers=32)).layers_block_type == ["mamba", "attention"] * 2
    assert miniature(RwkvConfig(rescale_every=6)).rescale_every == 2
    assert miniature(RwkvConfig(rescale_every=0)).rescale_every == 0
