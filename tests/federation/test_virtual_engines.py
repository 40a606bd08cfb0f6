"""One virtual clock on all engines: equal events to the bit, whatever plays the clients, also when the clock acts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

NETWORK = """
[default]
profile = "home"
availability = 0.65
[[clients]]
clients = [2]
uplink_mbps = 0.5
"""

FLAGS = shlex.split(
    "--clients 4 --rounds 2 --train.steps 2 --batch-size 2 --max-length 16 --eval.samples 2 --lora-rank 2 --threads 1 "
    "--trunk.threads 1 --micro-batches 1 --trunk.schedule copies --round-deadline 2"
)


@pytest.mark.slow
def test_engines_agree_to_the_bit(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text(NETWORK)
    found = {}
    for engine in ("local", "ray", "flower"):
        out = tmp_path / engine
        call = [sys.executable, "-m", "fedsplit.simulate", *FLAGS, "--network", str(file), "--engine", engine]
        done = subprocess.run([*call, "--out", str(out)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        network = [{**event, "time": ""} for event in events if event["event"] == "network"]
        adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        framing = json.loads((out / "summary.json").read_text())["framing"]
        found[engine] = network, adapter, framing
    assert found["ray"] == found["local"]
    assert found["flower"] == found["local"]
    assert any(event["late"] for event in found["local"][0]) and any(
        event["unavailable"] for event in found["local"][0]
    )
