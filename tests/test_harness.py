"""The bridge to lm-evaluation-harness that docs/results.md describes: merge, then its own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from finished_runs import Runs

from fedsplit.commands.adapters import main
from fedsplit.settings.config import BUNDLED_MODEL

TASK = """
task: notes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.mark.slow
def test_the_harness_measures_a_merged_run_as_its_base_with_the_adapter(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Needs the extra `harness`, which is not among the tools of development: scikit-learn slows transformers down."""
    pytest.importorskip("lm_eval")
    model = str(BUNDLED_MODEL)  # the harness wants a tokenizer with an end token
    (tmp_path / "runs").mkdir()
    run = Runs(tiny_models, tmp_path / "runs")(model, train__lr=0.1)
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    (tmp_path / "tasks").mkdir()
    (tmp_path / "notes.jsonl").write_text(json.dumps({"text": "the ward is"}) + "\n")
    (tmp_path / "tasks" / "notes.yaml").write_text(TASK.format(file=tmp_path / "notes.jsonl"))

    def bits(arguments: str) -> float:
        out = tmp_path / arguments.replace("/", "_")[-60:]
        flags = ["--model", "hf", "--model_args", f"{arguments},dtype=float32", "--tasks", "notes", "--device", "cpu"]
        flags += ["--include_path", str(tmp_path / "tasks"), "--batch_size", "1", "--output_path", str(out)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *flags], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        (written,) = out.rglob("results_*.json")
        found: float = json.loads(written.read_text())["results"]["notes"]["bits_per_byte,none"]
        return found

    merged = bits(f"pretrained={tmp_path / 'merged'}")
    assert merged == pytest.approx(bits(f"pretrained={model},peft={run / 'adapter'}"), rel=1e-4)
    assert abs(merged - bits(f"pretrained={model}")) > 1e-3
