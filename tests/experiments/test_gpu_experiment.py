"""The script for a GPU runs to its end, here in its small form on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "flwr", "datasets"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
sys.argv = ["measure", "--device", "cpu", "--small", "--out", sys.argv[1]]
from experiments.gpu.measure import main
main()
"""
"""The machines that the script is for have none of these."""


@pytest.mark.slow
def test_every_row_is_measured_and_the_split_is_exact(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(out)], capture_output=True, text=True, env=dict(os.environ), timeout=550
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())["measured"]
    assert not [name for name, found in measured.items() if "failed" in found]
    exact = {name: found for name, found in measured.items() if name.startswith("exact") and "skipped" not in found}
    assert len(exact) >= 6
    for name, found in exact.items():
        assert found["logits"] == found["loss"] == found["gradients"] == 0, name
        assert found["largest_gradient"] > 0.01, name
    for name, found in measured.items():
        if name.startswith("fused"):
            assert found["gradients"] < 1e-6, name
    assert set(measured["trunk, fp32"]) == {"batched", "sequential"}
