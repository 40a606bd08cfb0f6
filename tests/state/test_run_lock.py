"""One process at a time has a run's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit.errors import SettingError
from fedsplit.state.run_lock import lock

HOLD = "import sys; from pathlib import Path; from fedsplit.state.run_lock import lock; "
HOLD += "held = lock(Path(sys.argv[1])); print(flush=True); input()"


def test_a_lock_holds_until_its_process_is_gone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    call = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(SettingError, match=r"^run: .* is not possible; allowed: .* not at work any more$"):
            lock(tmp_path, setting="run")
        other.kill()
    lock(tmp_path).close()


def test_a_lock_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(tmp_path)
