"""Compute times that are measured once are read by the virtual clock."""

from __future__ import annotations

import json
from pathlib import Path

from fedsplit.federation.compute_profile import measured
from fedsplit.network.compute import TASKS, read_recorded
from fedsplit.settings.documents import build


def test_what_is_measured_can_be_read(tiny_models: dict[str, Path]) -> None:
    values = {"model": str(tiny_models["gpt2"]), "cut": "1:2", "train.batch_size": 2, "train.max_length": 16}
    document = measured(build(values), repetitions=2)
    compute = read_recorded(json.dumps(document))
    assert all(compute.seconds(task, 2, 16) > 0 for task in TASKS)
    assert build({"network.profile": "lan", "network.compute": document}).network.compute.startswith("{")
