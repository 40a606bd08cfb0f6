"""The base model that ships, and the script that made it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fedsplit.corpora.corpus import pack, sotu
from fedsplit.model.unsplit import load_unsplit
from fedsplit.model.vocabulary import load_tokenizer, open_tokenizer
from fedsplit.settings.config import BUNDLED_MODEL

EXPERIMENT = Path("experiments/base_model")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((EXPERIMENT / "result.json").read_text())


def test_it_has_the_loss_that_its_record_says(record: dict) -> None:
    """On some of the addresses that it was validated on; all of them take a minute."""
    names = record["validated_on"]
    documents = [document for document in sotu(last_year=1945) if document.name in names]
    assert [document.name for document in documents] == names
    ids = open_tokenizer(BUNDLED_MODEL).encode([document.text for document in documents])
    blocks = torch.tensor(pack(ids, 256, 0))[::16]
    with torch.no_grad():
        loss = float(load_unsplit(BUNDLED_MODEL)(input_ids=blocks, labels=blocks).loss)
    assert loss == pytest.approx(record["validation_loss"], abs=0.1)
    assert record["validation_loss"] < 3.42


def test_it_was_trained_as_the_configuration_says(record: dict) -> None:
    assert record["config"] == tomllib.loads((EXPERIMENT / "config.toml").read_text())
    assert record["parameters"] == load_unsplit(BUNDLED_MODEL).num_parameters()
    rows = list(csv.DictReader((EXPERIMENT / "curve.csv").open()))
    assert int(rows[-1]["step"]) == record["config"]["train"]["steps"]
    assert float(rows[-1]["validation_loss"]) == pytest.approx(record["validation_loss"], abs=0.01)


def test_it_is_small_and_its_tokenizer_takes_any_text() -> None:
    assert (BUNDLED_MODEL / "model.safetensors").stat().st_size < 3_000_000
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    text = "Fellow citizens: naïve café, 你好 \n\t 🦅"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token_id == 0


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    config = (EXPERIMENT / "config.toml").read_text().replace("batch_size = 32", "batch_size = 2")
    (tmp_path / "config.toml").write_text(config)
    argv = ["--out", str(tmp_path / "m"), "--record", str(tmp_path), "--steps", "3", "--validate", "4"]
    call = [sys.executable, str(EXPERIMENT / "train.py"), "--config", str(tmp_path / "config.toml"), *argv]
    done = subprocess.run(call, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert 3 < result["validation_loss"] < 8
    assert load_unsplit(tmp_path / "m").num_parameters() == result["parameters"]
