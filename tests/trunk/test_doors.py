"""Doors: several trunks are one port, and a budget that does not suffice is refused in a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsplit.errors import SettingError
from fedsplit.settings.documents import build
from fedsplit.trunk import doors


@pytest.mark.parametrize(
    ("settings", "kind", "trunks"),
    [({}, "str", 1), ({"trunk.stages": "1:2:5"}, "StagedTrunk", 2), ({"trunk.replicas": 2}, "ReplicatedTrunk", 2)],
)
def test_several_trunks_are_one_port_and_a_single_one_is_itself(
    settings: dict[str, object], kind: str, trunks: int
) -> None:
    config = build(settings)
    assert doors.count(config) == trunks
    names: Any = [["stage"] * (2 if "trunk.stages" in settings else 1)] * config.trunk.replicas
    assert type(doors.join(config, names)).__name__ == kind


@pytest.mark.parametrize(("least", "fits"), [(10**9, True), (10**9 + 1, False)])
def test_a_budget_must_suffice_for_a_step(least: int, fits: bool) -> None:
    trunk: Any = SimpleNamespace(status=lambda: SimpleNamespace(least_memory=least))
    config = build({"trunk.memory": "1GB"})
    if fits:
        doors.check_memory(config, trunk)
    else:
        with pytest.raises(SettingError, match=r"trunk\.memory: 1GB is not possible; allowed: at least 1001MB"):
            doors.check_memory(config, trunk)
    without: Any = None
    doors.check_memory(build({}), without)  # nothing is asked where there is no budget


@pytest.mark.slow
def test_no_ray_is_imported_for_a_trunk_of_this_process(tmp_path: Path) -> None:
    script = "import sys, fedsplit.engines.in_process, fedsplit.trunk.local; sys.exit('ray' in sys.modules)"
    root = Path(doors.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = [{str(root)!r}]; {script}"], cwd=tmp_path)
    assert done.returncode == 0


def test_a_run_with_the_trunk_of_a_server_starts_no_process_for_it() -> None:
    settings = {"cut": "1:5", "trunk.stages": "1:2:5", "trunk.replicas": 3}
    assert doors.count(build(settings)) == 6
    assert doors.count(build({**settings, "trunk.server": "127.0.0.1:50052"})) == 0
