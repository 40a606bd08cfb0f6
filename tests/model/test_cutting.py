"""Changes to a decoder that make it a part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BambaConfig, JambaConfig

from fedsplit.model.cutting import compute_first, cut_lists, fix_kinds


class _Twice(nn.Module):
    """Norms before and after a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, hidden: Tensor, fails: bool = False) -> Tensor:
        before = self.norm(hidden)
        if fails:
            raise RuntimeError("no memory")
        return self.norm(before * 3)


def test_a_module_of_both_ends_computes_before_the_blocks_alone() -> None:
    decoder, x = _Twice(), torch.randn(2, 4)
    expected = decoder.norm(x) * 3
    compute_first(decoder.norm, decoder)
    for _ in range(2):
        assert torch.equal(decoder(x), expected)
    assert [*decoder.state_dict()] == ["norm.weight", "norm.bias"]
    with pytest.raises(RuntimeError):
        decoder(x, fails=True)
    assert torch.equal(decoder(x), expected)  # a forward that failed has no effect on the next


def test_kinds_that_a_configuration_computes_stay_those_of_the_blocks() -> None:
    config = JambaConfig(num_hidden_layers=8, attn_layer_period=4, attn_layer_offset=1)
    expected = config.layers_block_type[3:6]
    assert expected == ["mamba", "mamba", "attention"]
    fix_kinds(config, range(3, 6), depth=8)
    config.num_hidden_layers = 3
    assert config.layers_block_type == expected
    assert type(JambaConfig()) is JambaConfig and isinstance(config, JambaConfig)


def test_block_numbers_begin_at_the_parts_first_block() -> None:
    config = BambaConfig(num_hidden_layers=6, attn_layer_indices=[1, 3, 5])
    cut_lists(config, range(2, 5), depth=6)
    assert config.attn_layer_indices == [1]
