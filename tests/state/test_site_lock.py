"""A site's folder is one client's at a time, and tells of a client that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.state.site_lock import locked


def test_a_folder_is_one_clients_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    with (
        locked(folder),
        pytest.raises(InputError, match=f"^folder: .* process {os.getpid()} or its SuperNode is"),
        locked(folder),
    ):
        pass
    with locked(folder):
        pass


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_client_that_does_not_take_leave_counts_as_killed(tmp_path: Path, ends_well: bool) -> None:
    with locked(tmp_path) as lock:
        assert not lock.was_killed
        if ends_well:
            lock.end_well()
    with locked(tmp_path) as lock:
        assert lock.was_killed is not ends_well


def test_a_child_that_inherits_the_lock_keeps_it_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from fedsplit.state.site_lock import locked\n"
        "with locked(Path(sys.argv[1])) as lock:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=(lock.descriptor,))\n"
        "    print(child.pid, flush=True)\n"
        "    child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    try:
        with pytest.raises(InputError, match="no other client"), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    while True:  # the child is not ours to wait for
        try:
            with locked(tmp_path) as lock:
                assert lock.was_killed
                return
        except InputError:
            continue
