"""Parameters and bytes of the parties, beside those of parts with weights; experiments/estimate measures the peaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.adaptation import lora
from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.estimation.party_memory import ALLOCATOR, client_memory, counts_of, trunk_memory
from fedsplit.estimation.party_shapes import Parties
from fedsplit.settings.documents import build


@pytest.mark.parametrize("settings", [{}, {"lm_head": "full"}, {"lm_head": "lora"}, {"prompt.kind": "prompt"}], ids=str)
def test_parameters_are_those_of_the_parts(settings: dict[str, Any]) -> None:
    config = build({"cut": "2:4", **settings})
    bottom, top = bare_parts(config, ["bottom", "top"])
    for part in (bottom, top):
        adapt(part, config)
    counts = [lora.count(bottom), lora.count(top, elsewhere=[bottom])]
    found = counts_of(Parties(config), ["bottom", "top"])
    assert found.parameters == sum(count["total"] for count in counts)
    assert found.trainable == sum(count["trainable"] for count in counts)


def test_an_untied_head_counts_by_itself(tiny_models: dict[str, Path]) -> None:
    config = build({"model": str(tiny_models["llama"]), "cut": "1:2"})
    (bottom, top), (trunk,) = bare_parts(config, ["bottom", "top"]), bare_parts(config, ["trunk"])
    parties = Parties(config)
    base = sum(parameter.nbytes for part in (bottom, top) for parameter in part.parameters())
    assert counts_of(parties, ["bottom", "top"]).weights == base
    assert counts_of(parties, ["trunk"]).weights == sum(parameter.nbytes for parameter in trunk.parameters())


def test_moments_follow_the_optimiser() -> None:
    def moments(**settings: object) -> float:
        values = {name.replace("__", "."): value for name, value in settings.items()}
        memory = client_memory(Parties(build({"train.micro_batches": 1, **values})))
        return memory.moments / memory.trainable

    assert moments() == 8  # two float32 numbers
    assert moments(train__optimizer="sgd") == 0
    assert moments(train__optimizer="sgd", train__momentum=0.9) == 4


def test_a_party_that_does_not_learn_has_no_moments() -> None:
    parties = Parties(build({"trunk.schedule": "forward-only", "train.micro_batches": 1}))
    assert trunk_memory(parties).moments == 0 and trunk_memory(parties).trainable == 0
    assert client_memory(parties).trainable == counts_of(Parties(build({})), ["top"]).trainable


def test_weights_in_few_bits_are_smaller(tiny_models: dict[str, Path]) -> None:
    settings = {"model": str(tiny_models["llama"]), "cut": "1:2"}
    whole = counts_of(Parties(build(settings)), ["trunk"]).weights
    narrow = counts_of(Parties(build({**settings, "quantization": "trunk:4"})), ["trunk"]).weights
    assert whole / 7.5 < narrow < whole / 6


def test_pending_batches_add_up() -> None:
    parties = Parties(build({"train.micro_batches": 1}))
    one, three = trunk_memory(parties), trunk_memory(parties, pending=3)
    assert three.peak - one.peak == pytest.approx(2 * ALLOCATOR * one.activations, abs=2)
