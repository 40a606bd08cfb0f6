"""The parties without weights are those of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.adaptation import lora
from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.estimation.party_shapes import Parties, Workload
from fedsplit.model.parts import Kind
from fedsplit.settings.documents import build


@pytest.mark.parametrize("kind", ["bottom", "trunk", "top"])
def test_adapters_have_the_names_and_shapes_of_a_runs(kind: Kind) -> None:
    config = build({"cut": "2:4", "lm_head": "lora"})
    (part,) = bare_parts(config, [kind])
    adapt(part, config)
    expected = {name: tensor.shape for name, tensor in lora.parameters(part).items()}
    assert {name: tensor.shape for name, tensor in Parties(config).adapters([kind]).tensors.items()} == expected


def test_stages_divide_the_trunk() -> None:
    parties = Parties(build({"trunk.stages": "1:3:5"}))
    assert [len(stage.blocks) for stage in parties.stages] == [2, 2]
    assert parties.trunk_learns and parties.stage_learns(1)


def test_float32_adapters_widen_what_crosses(tiny_models: dict[str, Path]) -> None:
    settings = {"model": str(tiny_models["mixtral"]), "cut": "1:2", "dtype": "bf16"}
    assert Parties(build(settings)).dtype_behind(-1) == torch.bfloat16
    assert Parties(build({**settings, "lora.method": "ln_tuning"})).dtype_behind(0) == torch.float32


def test_a_classifier_has_a_head_for_its_classes() -> None:
    parties = Parties(build({"data.format": "classification"}), Workload(classes=3))
    assert parties.adapters(["top"]).tensors["score.weight"].shape == (3, 128)
    assert parties.trace("top", 2).needs_gradient
