"""Pieces of projections: which are cut and how, what is read, what is refused, and masks of dropout that fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS

from fedsplit.errors import SettingError
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.kernels import lora_linear
from fedsplit.model.parts import Part
from fedsplit.model.process_group import Shard
from fedsplit.model.split import empty_part, load_parts
from fedsplit.model.tensor_parallel import COLUMNS, PieceDropout, check_sizes, cut_dimension, styles_of


def empty(path: Path) -> Part:
    return empty_part(path, (1, 3), "trunk", torch.float32, fused=False, classes=0)


def with_config(folder: Path, family: str, **more: Any) -> Path:
    config = copy.copy(CONFIGS[family]())
    for key, value in more.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "columns", "rows"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}),
        ("gemma3_text", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}),
        ("phi3", {"qkv_proj", "gate_up_proj"}, {"o_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense_h_to_4h"}, {"dense", "dense_4h_to_h"}),
    ],
)
def test_the_plan_is_the_librarys(family: str, columns: set[str], rows: set[str], tiny_models: dict[str, Path]) -> None:
    """Each projection that an adapter can have is cut, in each block of the trunk."""
    part = empty(tiny_models[family])
    styles = styles_of(part, 2)
    assert len(styles) == 2 * len(columns | rows)
    assert {name.rpartition(".")[2] for name, style in styles.items() if style in COLUMNS} == columns
    assert {name.rpartition(".")[2] for name, style in styles.items() if style not in COLUMNS} == rows
    assert columns | rows == {*part.family.targets}
    check_sizes(part, 2)


@pytest.mark.parametrize(
    ("family", "size", "more", "message"),
    [
        ("gpt2", 2, {}, "2 is not possible; allowed: 1 for a model of type gpt2, for which transformers has no plan"),
        ("opt", 2, {}, "2 is not possible; allowed: 1 for a model of type opt, for which transformers has no plan"),
        ("mixtral", 2, {}, "2 is not possible; allowed: 1 for a model of type mixtral, whose experts would have to be"),
        ("llama", 3, {}, "3 is not possible; allowed: a divisor of 4, the num_attention_heads of the model"),
        ("llama", 4, {}, "4 is not possible; allowed: a divisor of 2, the num_key_value_heads of the model"),
        ("llama", 2, {"intermediate_size": 63}, "2 is not possible; allowed: a divisor of 63, the width at which mod"),
        ("phi3", 3, {}, "3 is not possible; allowed: a divisor of 32, the width at which model.layers.1.self_attn.o_p"),
        ("llama", 2, {"attention_dropout": 0.1}, "2 is not possible; allowed: 1 for a model with attention_dropout in"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    family: str, size: int, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as caught:
        check_sizes(empty(with_config(tmp_path, family, **more)), size)
    assert str(caught.value).startswith(f"trunk.tensor_parallel: {message}")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_the_pieces_together_are_the_weights(family: str, tiny_models: dict[str, Path]) -> None:
    path = tiny_models[family]
    (whole,) = load_parts(path, (1, 3), ["trunk"])
    pieces = [load_parts(path, (1, 3), ["trunk"], shard=Shard(rank, 2))[0] for rank in range(2)]
    styles = styles_of(empty(path), 2)
    for name, parameter in whole.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module not in styles:
            assert all(torch.equal(piece.get_parameter(name), parameter) for piece in pieces), name
        elif leaf == "weight":
            found = [piece.get_parameter(name) for piece in pieces]
            assert torch.equal(torch.cat(found, cut_dimension(styles[module])), parameter), name
        elif styles[module] in COLUMNS:
            assert torch.equal(torch.cat([piece.get_parameter(name) for piece in pieces]), parameter), name
        else:  # the outputs are added, and the bias must count once
            assert torch.equal(pieces[0].get_parameter(name), parameter), name
            assert pieces[1].get_submodule(module).bias is None


def test_no_projection_is_ever_read_whole(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    values: list[int] = []
    parameter, slices = CheckpointReader.parameter, CheckpointReader._slices

    def whole(reader: CheckpointReader, name: str, *rest: Any) -> torch.nn.Parameter:
        read.append(name)
        return parameter(reader, name, *rest)

    def piecewise(*arguments: Any) -> Any:
        for place, tensor in slices(*arguments):
            values.append(tensor.numel())
            yield place, tensor

    monkeypatch.setattr(CheckpointReader, "parameter", whole)
    monkeypatch.setattr(CheckpointReader, "_slices", piecewise)
    (part,) = load_parts(tiny_models["llama"], (1, 3), ["trunk"], shard=Shard(1, 2))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in read} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    cut = [part.get_parameter(f"{name}.weight") for name in styles_of(empty(tiny_models["llama"]), 2)]
    assert sum(values) == sum(weight.numel() for weight in cut)


@pytest.mark.parametrize("fused", [True, False])
def test_masks_of_pieces_are_those_of_the_whole(fused: bool) -> None:
    x = torch.randn(3, 5, 8)
    found = []
    for rank in range(2):
        dropout = PieceDropout(0.4, Shard(rank, 2), fused)
        torch.manual_seed(1)
        found.append(dropout(x[..., Shard(rank, 2).of(8)]))
        after = torch.rand(1)
        assert torch.equal(dropout.eval()(x), x)
    torch.manual_seed(1)
    if fused:
        expected = lora_linear(x, torch.zeros(8, 8), None, torch.eye(8), torch.eye(8), 1.0, 0.4)
    else:
        expected = torch.nn.functional.dropout(x, 0.4)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(torch.cat(found, -1), expected)
    assert 0 < int((expected == 0).sum()) < expected.numel()
