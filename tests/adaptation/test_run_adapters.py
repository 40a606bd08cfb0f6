"""Which adapter a part gets, and what of the whole belongs to it."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import BLOCKS

from fedsplit.adaptation import lora
from fedsplit.adaptation.prompts import SAVED
from fedsplit.adaptation.run_adapters import adapt, load, of_part, save
from fedsplit.lowrank import LowRank
from fedsplit.model.parts import ranges
from fedsplit.model.split import load_parts
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

KINDS = ("bottom", "trunk", "top")


def adapted(config: Config):
    parts = load_parts(config.model_path, config.bounds, KINDS)
    for part in parts:
        adapt(part, config)
    return parts


def test_the_settings_decide_what_trains_and_parts_make_up_the_whole(tmp_path: Path, tiny_models) -> None:
    """Every tensor belongs to one part, and files give back what PEFT keeps of it."""
    common = {"model": str(tiny_models["gpt2"]), "cut": "1:2"}
    for number, values in enumerate(
        ({}, {"lm_head": "lora"}, {"lm_head": "full"}, {"prompt.kind": "ptuning"}, {"prompt.kind": "prefix"})
    ):
        config = build(common | values)
        parts = adapted(config)
        whole, family = lora.read(*parts), parts[0].family
        pieces = {kind: of_part(whole, config, family, kind, ranges(BLOCKS, (1, 2))[kind]) for kind in KINDS}
        for part in parts:
            assert pieces[part.kind].tensors.keys() == lora.parameters(part).keys()
            assert pieces[part.kind].layers == lora.read(part).layers
        folder = tmp_path / str(number)
        save(folder, whole, config, family)
        read = load(folder)
        if config.prompt.kind == "off":
            assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in whole.tensors.items())
            assert read.layers == whole.layers
        else:
            assert read.tensors.keys() == {SAVED} and not read.layers


def test_what_is_folded_goes_with_its_part(tiny_models) -> None:
    config = build({"model": str(tiny_models["gpt2"]), "cut": "1:2", "lm_head": "lora"})
    parts = adapted(config)
    whole = lora.read(*parts)
    folded = {layer: LowRank(torch.ones(2, 1), torch.ones(1, 2)) for layer in whole.layers}
    for part in parts:
        found = of_part(
            type(whole)(whole.tensors, whole.layers, folded), config, part.family, part.kind, part.blocks
        ).folded
        assert found.keys() == lora.read(part).layers.keys()
