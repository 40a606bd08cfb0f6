"""Layers inside blocks that can have adapters."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CTRLConfig, FalconConfig, MambaConfig, Qwen2MoeConfig
from transformers.pytorch_utils import Conv1D

from fedsplit.model.block_layers import is_balanced, narrows_of, norms_of, parameters_of, router_of, targets_of
from fedsplit.model.miniature import miniature


class Block(nn.Module):
    """A block with an attention and an MLP that share a name, and a norm without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_proj": Conv1D(8, 8)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(32, 8), "c_proj": Conv1D(8, 32), "gate": nn.Linear(8, 4)})
        self.norm_1 = nn.LayerNorm(8)
        self.norm_2 = nn.LayerNorm(8, elementwise_affine=False)


def blocks_of(config: object) -> tuple[nn.Module, list[nn.Module]]:
    """A miniature of a type, and its blocks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(miniature(config))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return model, list(lists[0])


def modules_of(blocks: list[nn.Module]) -> list[nn.Module]:
    """All modules inside blocks, as if each computed."""
    return [module for block in blocks for module in block.modules()]


def test_names_of_a_block() -> None:
    blocks: list[nn.Module] = [Block(), Block()]
    assert targets_of(blocks, {}, modules_of(blocks)) == (("c_proj", "c_fc"), ())  # a router gets no adapter
    assert narrows_of(blocks, 8) == ("mlp.c_proj",)  # the attention's has the same last name
    assert norms_of(blocks) == ("norm_1",)


def test_layers_whose_names_are_numbers_have_their_parents_name_too() -> None:
    _, blocks = blocks_of(CTRLConfig())
    assert targets_of(blocks, {}, modules_of(blocks))[0] == ("Wq", "Wk", "Wv", "dense", "ffn.0", "ffn.2")


def test_kinds_of_linear_layers_count_and_what_peft_refuses_does_not() -> None:
    _, falcon = blocks_of(FalconConfig())
    assert targets_of(falcon, {}, modules_of(falcon))[0] == (
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    )
    _, mamba = blocks_of(MambaConfig())
    assert (
        "in_proj" in targets_of(mamba, {}, modules_of(mamba))[0]
        and "out_proj" not in targets_of(mamba, {}, modules_of(mamba))[0]
    )


def test_a_router_is_found_where_the_library_balances_by_it() -> None:
    model, blocks = blocks_of(Qwen2MoeConfig())
    assert is_balanced(model) and router_of(model, blocks) == "mlp.gate"
    assert parameters_of(blocks, "mlp.gate").keys() == {"gate_up_proj", "down_proj", "gate"}
    assert parameters_of(blocks, None).keys() == {"gate_up_proj", "down_proj"}
    model, blocks = blocks_of(FalconConfig())
    assert not is_balanced(model) and router_of(model, blocks) is None and parameters_of(blocks, None) == {}
