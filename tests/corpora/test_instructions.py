"""Instruction data as people publish it."""

from __future__ import annotations

import copy

import pytest

from fedsplit.corpora.instructions import as_messages, prompt_of


def test_turns_get_the_keys_that_trl_gives_them() -> None:
    """TRL renames the keys alone, and leaves roles as they are."""
    data_utils = pytest.importorskip("trl.data_utils")
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "user", "value": "hi", "name": "ann"},
        {"from": "assistant", "value": "yes"},
    ]
    expected = data_utils.maybe_convert_to_chatml({"conversations": copy.deepcopy(turns)})
    assert as_messages(turns) == expected["messages"]


def test_sharegpt_names_its_speakers_otherwise() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    assert [turn["role"] for turn in as_messages(turns)] == ["user", "assistant"]
    for other in (None, "hi", [], [{"role": "user", "content": "hi"}]):
        assert as_messages(other) == other
    for speaker in ("observation", 3, None):
        with pytest.raises(ValueError, match="a conversation whose speakers are human"):
            as_messages([{"from": speaker, "value": "x"}])


def test_alpacas_prompt() -> None:
    """As written in Stanford's train.py; braces in an instruction stay."""
    prompt = prompt_of("Use {input}.", "")
    assert prompt.endswith("completes the request.\n\n### Instruction:\nUse {input}.\n\n### Response:")
    assert "### Input:\n{x}\n\n### Response:" in prompt_of("Do.", "{x}")
