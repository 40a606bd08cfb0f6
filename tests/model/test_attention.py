"""What is chosen in place of the library's own: attention in float32, torch's activation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from transformers import AutoConfig

from fedsplit.model.attention import use_float32_attention, use_tanh_gelu
from fedsplit.model.unsplit import load_unsplit


@torch.no_grad()
def test_narrow_attention_is_that_of_float32_rounded_once(model_path: Path) -> None:
    """As close to the model in float32 as the library's own, which rounds within attention as well."""
    ids = torch.randint(1, VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    exact = load_unsplit(model_path)(ids).logits
    errors = []
    for wide in (False, True):
        whole = load_unsplit(model_path, torch.bfloat16)
        if wide:
            use_float32_attention(whole.config, torch.bfloat16)
            assert whole.config._attn_implementation != "sdpa"
        errors.append(float((whole(ids).logits.float() - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 0.02
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize(("kind", "dtype"), [("sdpa", torch.float32), ("eager", torch.bfloat16)])
def test_the_librarys_choice_stays_where_it_is_no_narrow_sdpa(model_path: Path, kind: str, dtype: torch.dtype) -> None:
    config = AutoConfig.from_pretrained(model_path)
    config._attn_implementation = kind
    use_float32_attention(config, dtype)
    assert config._attn_implementation == kind


def test_torchs_gelu_is_chosen_for_the_same_function(tiny_models: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_models["gpt2"])
    assert config.activation_function == "gelu_new"
    use_tanh_gelu(config)
    assert config.activation_function == "gelu_pytorch_tanh"
    other = AutoConfig.from_pretrained(tiny_models["llama"])
    use_tanh_gelu(other)
    assert other.hidden_act == "silu"
