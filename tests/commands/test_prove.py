"""The command that proves a model's cut, and the run that asks for the proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaModel
from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig

from fedsplit.commands import prove as command
from fedsplit.commands import run_checks
from fedsplit.errors import SettingError
from fedsplit.proving import kept, proof
from fedsplit.proving.proof import Proof
from fedsplit.settings.documents import build

BAD = Proof("llama", ((0, 1),), {}, {"loss": "cut 0:1: differs from the uncut model by up to 0.5"}, 0.1)


def test_the_table_names_modules_and_checks(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tiny_models["mixtral"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("is of type mixtral")
    assert "  blocks       model.layers" in lines
    assert "  balance        4 of 4  equal up to rounding" in lines
    assert lines[-2:-1] == ["cuts that are exact: LO and HI among 0-3"]
    assert lines[-1].startswith("mixtral: cut proved at 4 places")


def test_the_table_of_a_classifier(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tiny_models["llama"]), "--task", "classification"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  top          norm, score" in lines and "  padding left" not in "".join(lines)
    assert lines[-1].startswith("llama: cut of the classifier proved")


def test_cuts_of_a_model_that_is_exact_at_some() -> None:
    alone = Proof("zaya", ((0, 4),), {}, {}, 0.1, inner="logits: cut 0:1: differs")
    assert command.cuts_in_words(alone, LlamaConfig(num_hidden_layers=80)) == "0:80 alone, all blocks in the trunk"
    kinds = ["sliding_attention", "full_attention"] * 3
    shared = Gemma4UnifiedTextConfig(num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
    words = "LO and HI among 0-2, 6; between the others, blocks read keys and values of earlier blocks"
    assert command.cuts_in_words(Proof("gemma4_unified_text", ((0, 1),)), shared) == words
    assert command.cuts_in_words(BAD, LlamaConfig()) == "none"


def test_as_json(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tiny_models["llama"]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["family"]["after"] == ["norm"] and document["proof"]["faults"] == {}


def test_a_folder_with_config_json_alone_is_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    assert command.main([str(tmp_path)]) == 0
    assert "llama: cut proved at" in capsys.readouterr().out


def test_a_model_that_transformers_cannot_run_is_told_apart(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise IndexError("no such block")

    monkeypatch.setattr(proof, "prove", fail)
    assert command.main([str(tiny_models["llama"])]) == 1  # the uncut model runs: a fault of the proof's own
    assert "transformers' own model" not in capsys.readouterr().err
    monkeypatch.setattr(LlamaModel, "forward", fail)
    assert command.main([str(tiny_models["llama"])]) == 2
    error = capsys.readouterr().err
    assert "transformers' own model of type llama does not run with this configuration" in error
    assert "no such block" in error


def test_a_difference_is_told_and_ends_the_command_with_an_error(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "prove", lambda config, classifies: BAD)
    assert command.main([str(tiny_models["llama"])]) == 2
    output = capsys.readouterr()
    assert "  loss           cut 0:1: differs from the uncut model by up to 0.5" in output.out
    assert output.err.endswith("cannot be cut exactly\n")


def test_a_run_on_a_type_that_differs_is_refused_unless_the_user_insists(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kept, "prove", lambda config, classifies: BAD)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = {"model": str(tiny_models["llama"]), "cut": "1:2", "out": str(tmp_path / "run"), "clients": 2}
    values |= {"dataset": str(corpus_file), "train.max_length": 16}
    with pytest.raises(SettingError, match=r"type llama, whose parts are not the model \(loss, cut 0:1: differs"):
        run_checks.check(build(values))
    classes = tmp_path / "classes.jsonl"
    classes.write_text("".join(f'{{"text": "a text {n}", "label": {n % 2}}}\n' for n in range(40)))
    asked: list[bool] = []

    def refuse(config: object, classifies: bool) -> Proof:
        asked.append(classifies)
        return BAD

    monkeypatch.setattr(kept, "prove", refuse)
    with pytest.raises(SettingError, match="whose parts are not the model"):
        run_checks.check(build({**values, "dataset": str(classes), "data.format": "classification"}))
    assert asked == [True]
    run_checks.check(build({**values, "unproved": True}))
    assert "not compared with the uncut model" in capsys.readouterr().out
