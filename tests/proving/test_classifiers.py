"""The proof of sequence classifiers."""

from __future__ import annotations

import pytest
from conftest import CONFIGS
from torch import Tensor
from transformers import GraniteConfig

from fedsplit.errors import SettingError
from fedsplit.model.parts import Top
from fedsplit.proving.proof import prove


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_classifiers_are_proved_at_every_place(name: str) -> None:
    config = CONFIGS[name]()
    config.problem_type = "regression"  # what config.json asks for is no concern of a run
    proof = prove(config, classifies=True)
    assert proof.trains and not proof.generates, proof.faults
    for check in ("logits", "padding right", "loss", "gradients"):
        assert proof.equal[check] == len(proof.cuts)
    assert proof.equal["export"] == proof.equal["kernels"] == 1
    assert "causality" not in proof.equal
    assert proof.summary.startswith(f"{proof.model_type}: cut of the classifier proved")


def test_a_wrong_choice_of_the_last_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_token(self: Top, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.score(states)[:, 0]

    monkeypatch.setattr(Top, "classify", first_token)
    proof = prove(CONFIGS["llama"](), classifies=True)
    assert "differs from the uncut model" in proof.faults["logits"] and not proof.trains


def test_a_type_without_a_sequence_classifier_is_refused() -> None:
    with pytest.raises(SettingError, match="type granite, of which transformers has no sequence classifier"):
        prove(GraniteConfig(), classifies=True)
