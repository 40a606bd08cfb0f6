"""Terms of a run: every setting that a trunk's numbers depend on, and no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import fedsplit
from fedsplit.federation.trunk_terms import OF_NO_MATTER, terms_of
from fedsplit.settings.config import SECTIONS, SETTINGS, Config
from fedsplit.settings.documents import build

COMMON: dict[str, object] = {"clients": 2}


def differing(settings: dict[str, object], options: dict[str, object] | None = None) -> list[str]:
    """Names of the terms that change by some settings."""
    found = terms_of(build(COMMON)).differences(terms_of(build({**COMMON, **settings}, options or {})))
    return [words.partition(" ")[0] for words in found]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"seed": 1}, ["seed"]),
        ({"clients": 3}, ["clients"]),
        ({"rounds": 9}, ["rounds"]),
        ({"cut": "2:5"}, ["cut"]),
        ({"strategy": "fedex"}, ["strategy"]),
        ({"lora.rank": 4, "train.lr": 0.5}, ["lora.rank", "train.lr"]),
        ({"trunk.schedule": "copies"}, ["trunk.schedule"]),
        ({"wire.codec": "bf16"}, ["wire.codec"]),
        ({"dtype": "bf16"}, ["dtype"]),
        ({"dataset": "mine.jsonl", "data.format": "chat", "partition": "iid", "eval.samples": 1}, []),
        ({"train.micro_batches": 2, "router_aux_loss": 0.5, "fraction": 0.5, "weights": "equal"}, []),
        ({"engine": "local", "workers": 3, "trunk.threads": 2, "trunk.server": "h:1", "trunk.tls": "x"}, []),
        ({"out": "x", "quiet": True, "patience": 3, "adapter.codec": "bf16"}, []),
    ],
    ids=str,
)
def test_settings_that_a_trunk_computes_with_are_terms(settings: dict[str, object], names: list[str]) -> None:
    assert differing(settings) == names


def test_arguments_of_the_strategy_are_terms() -> None:
    with_strategy: dict[str, object] = {"strategy": "fedprox"}
    ours = terms_of(build({**COMMON, **with_strategy}, {"mu": 0.1}))
    theirs = terms_of(build({**COMMON, **with_strategy}, {"mu": 0.2}))
    assert ours.differences(theirs) == ("strategy.mu (0.1 at the trunk, 0.2 in the run)",)


def test_the_model_counts_by_content_and_not_by_place(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "elsewhere"
    model.mkdir()
    for file in tiny_models["gpt2"].iterdir():
        (model / file.name).write_bytes(file.read_bytes())

    def terms(folder: Path) -> object:
        return terms_of(build({**COMMON, "model": str(folder), "cut": "1:2"}))

    assert terms(model) == terms(tiny_models["gpt2"])
    with open(model / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x07")
    found = terms_of(build({**COMMON, "model": str(model), "cut": "1:2"}))
    ours = terms_of(build({**COMMON, "model": str(tiny_models["gpt2"]), "cut": "1:2"}))
    assert ours.differences(found) == ("model (model.safetensors)",)


def test_the_users_strategy_and_the_initial_adapter_count_by_content(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine: ...\n")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    config = build({**COMMON, "strategy": f"{tmp_path}/mine.py:Mine", "init_adapter": str(adapter)})
    before = terms_of(config)
    assert before.code.keys() == {"strategy", "init_adapter/adapter_config.json"}
    (tmp_path / "mine.py").write_text("class Mine: pass\n")
    assert before.differences(terms_of(config)) == ("strategy (its files)",)


def test_the_version_is_a_term() -> None:
    ours = terms_of(Config())
    assert ours.version == fedsplit.__version__
    assert ours.differences(dataclasses.replace(ours, version="0.0")) != ()


def test_every_name_that_is_left_out_is_a_setting_or_a_section() -> None:
    assert {*SETTINGS, *SECTIONS} >= OF_NO_MATTER
