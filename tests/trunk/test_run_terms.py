"""Terms of a run and of a trunk: whatever moves a number is named where it differs."""

from __future__ import annotations

import dataclasses

import pytest

from fedsplit.trunk.run_terms import Terms

TERMS = Terms({"seed": "0", "cut": '"1:5"'}, {"config.json": "a", "model.safetensors": "b"}, {"strategy": "c"}, "1.0")


def test_equal_terms_differ_in_nothing() -> None:
    assert TERMS.differences(dataclasses.replace(TERMS)) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"seed": "1", "cut": '"1:5"'}}, "seed (0 at the trunk, 1 in the run)"),
        ({"settings": {"seed": "0"}}, 'cut ("1:5" at the trunk, nothing in the run)'),
        ({"settings": {**TERMS.settings, "new": "x" * 99}}, f"new (nothing at the trunk, {'x' * 40}… in the run)"),
        ({"model": {"config.json": "z"}}, "model (config.json)"),
        ({"model": {"other.bin": "b"}}, "model (no file of the same name)"),
        ({"code": {"strategy": "z"}}, "strategy (its files)"),
        ({"code": {}}, "strategy (its files)"),
        ({"version": "1.1"}, "fedsplit (1.0 at the trunk, 1.1 in the run)"),
    ],
    ids=["value", "missing", "new", "file", "files", "code", "no-code", "version"],
)
def test_a_difference_is_named_with_both_sides(change: dict[str, object], words: str) -> None:
    assert TERMS.differences(dataclasses.replace(TERMS, **change)) == (words,)  # type: ignore[arg-type]


def test_a_party_may_have_fewer_files_of_the_model() -> None:
    fewer = dataclasses.replace(TERMS, model={"config.json": "a"})
    assert TERMS.differences(fewer) == () == fewer.differences(TERMS)
