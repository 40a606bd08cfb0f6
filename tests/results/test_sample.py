"""A text before and after: of the base model, and of the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_runs import Runs

import fedsplit
from fedsplit.results.sample import sample


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Runs(tiny_models, tmp_path_factory.mktemp("runs"))("llama", train__lr=0.5)


def test_the_texts_are_those_of_the_base_and_of_the_runs_model(run: Path) -> None:
    before, after = sample(run, "the", tokens=8)
    result = fedsplit.open(run)
    model, tokenizer = result.model(), result.tokenizer()
    ids = tokenizer("the", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert after == tokenizer.decode(model.generate(ids, **options)[0], skip_special_tokens=True)
    with model.disable_adapter():
        assert before == tokenizer.decode(model.generate(ids, **options)[0], skip_special_tokens=True)
    assert before != after


def test_a_text_ends_where_the_models_positions_end(run: Path) -> None:
    before, _ = sample(run, "a" * 28, tokens=100)
    assert len(before) >= 28
