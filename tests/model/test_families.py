"""The record of a model's type."""

from __future__ import annotations

from fedsplit.model.families import Family


def test_the_parameters_that_are_asked_for_keep_their_order() -> None:
    family = Family("model", "layers", "embed_tokens", parameters={"gate": "mlp.gate.weight", "down_proj": "x"})
    assert family.asked(["down_proj", "q_proj", "gate"]) == ["down_proj", "gate"]
    assert family.asked([]) == []
