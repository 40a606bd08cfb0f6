"""The command that estimates a run, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.commands import estimate as command

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def write(folder: Path, document: Any, name: str = "config.json") -> Path:
    """Writes a configuration, and returns its file."""
    file = folder / name
    file.write_text(json.dumps(document))
    return file


def test_the_question_of_the_twenty_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-3-8B from its config.json alone: no weight, no tokenizer, and no file of another name."""
    file = write(tmp_path, LLAMA_3_8B, "llama-3-8b.json")
    argv = ["--model", str(file), "--cut", "2:30", "--clients", "20", "--network", "home", "--dtype", "bf16", "--json"]
    assert command.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(file)
    memory = found["memory"]
    adapters = memory["client"]["trainable"] + memory["trunk"]["trainable"]
    assert memory["client"]["parameters"] + memory["trunk"]["parameters"] - adapters == 8_030_261_248
    assert adapters == 20_971_520  # r = 8 on seven projections of 32 blocks
    assert found["bytes"]["step"]["activation_up"] == 4 * 128 * 4096 * 2
    assert found["flops"]["trunk"]["forward"] == pytest.approx(28 * (218_103_808 + 655_360) * 2 * 512, rel=0.02)
    assert found["alternatives"][0]["seconds"]["round"] <= found["seconds"]["round"]


def test_a_folder_gives_lines_for_people(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(tiny_models["llama"]), "--cut", "1:2", "--rounds", "2", "--max-length", "16"]
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("llama, 3 blocks of width 32, fp32")
    assert "assumed" in lines and lines[-1].startswith("  - alternatives replay")


def test_a_settings_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('clients = 3\n[train]\nsteps = 2\n[wire]\ncodec = "bf16"\n')
    assert command.main(["--config", str(file), "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clients"], found["steps_a_round"], found["codec"]) == (3, 2, "bf16")


def changed(**values: object) -> dict[str, object]:
    return {**LLAMA_3_8B, **values}


BAD_MODELS: list[tuple[object, str]] = [
    ({}, "model: "),
    ([], "model: "),
    ({"model_type": "bert"}, "encoder"),
    ({"model_type": "t5"}, "an encoder with a decoder"),
    ({"model_type": "nonsense"}, "model: "),
    (changed(num_hidden_layers=100_000), "100000 blocks"),
    (changed(num_hidden_layers=0), "num_hidden_layers"),
    (changed(hidden_size="wide"), "model: "),
    (changed(hidden_size=-4096), "negative dimension"),
    (changed(hidden_size=10**30), "model: "),
    (changed(num_attention_heads=0), "model: "),
    (changed(num_attention_heads=33), "model: "),
    (changed(vocab_size=-1), "model: "),
    (changed(num_key_value_heads=5), "sizes fit each other"),
    (changed(intermediate_size=0.5), "model: "),
    (changed(max_position_embeddings=True), "max_position_embeddings"),
]


@pytest.mark.parametrize(("document", "words"), BAD_MODELS, ids=lambda value: str(value)[:40])
def test_a_model_that_is_none_is_one_line(
    document: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--model", str(write(tmp_path, document)), "--cut", "2:30"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and words in errors[0], errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "/nowhere/config.json"], "model: /nowhere/config.json is not possible"),
        (["--cut", "1:9"], "cut: 1:9 is not possible"),
        (["--network", "moon"], "network.profile: moon is not possible"),
        (["--client.hardware", "abacus"], "--client.hardware: abacus is not possible"),
        (["--trunk.hardware", "-3"], "--trunk.hardware: -3 is not possible"),
        (["--clients", "0"], "clients: 0"),
        (["--epochs", "2"], "--epochs needs --sequences"),
        (["--sequences", "0"], "--sequences: 0 is not possible"),
        (["--held-out", "many"], "--held-out: many is not possible"),
        (["--classes", "1", "--data.format", "classification"], "--classes: 1 is not possible"),
        (["--clients", "2147483647"], "up to 100,000"),
        (["--rounds", "2147483647"], "up to 100,000"),
        (["--clients", "5000"], "up to 1,000 clients in a round"),
        (["--classes", "3"], "--classes belongs to"),
        (["--strategy", "nothing"], "strategy: "),
        (["--nonsense", "1"], "there is no flag --nonsense"),
        (["--max-length", "4096"], "train.max_length: 4096 is not possible"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and words in errors[0], errors


def test_several_errors_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--network", "moon", "--cut", "1:9", "--held-out", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) >= 3


def test_broken_json_is_said_with_the_path_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1,,}')
    assert command.main(["--model", str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and "line 1 column 9" in error
    file.write_text(json.dumps(changed(num_key_value_heads=5)))
    assert command.main(["--model", str(file), "--cut", "2:30", "--rounds", "1", "--clients", "1"]) == 2
    assert f"model: {file} (" in capsys.readouterr().err


def test_what_will_go_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--clients", "2", "--rounds", "1", "--trunk.memory", "300MB", "--network", "home"]
    assert command.main([*argv, "--round-deadline", "0.1", "--wire.gradient-up", "int4"]) == 0
    said = capsys.readouterr().out
    assert "mind: --trunk.memory 300MB is less" in said and "mind: no update can arrive" in said
    assert "codec: by role" in said and "--wire.codec int4 --wire.gradient-up int4" in said
