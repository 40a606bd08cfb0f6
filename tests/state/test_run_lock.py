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


@pytest.mark.parametrize("name", ["checkpoints", "clients", "personal"])
def test_a_run_with_a_folder_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    """Its files would be written, or removed, there."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    if name == "checkpoints":
        (run / name).rmdir()
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingError, match=rf"^resume: .*run \({name} is a symbolic link\) is not possible"):
        lock(run)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "checkpoints" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        lock(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
