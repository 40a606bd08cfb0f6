"""A Ray of our own: where its session lies, who may look into it, and what stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from ray._private import worker

from fedsplit import environment, shutdown
from fedsplit.trunk import cluster
from fedsplit.wire.casting import EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_tensor_that_has_crossed_may_be_changed(dtype: torch.dtype) -> None:
    """Ray puts arrays into memory that must not be written to."""
    sent = torch.arange(6).reshape(2, 3).to(dtype)
    crossing = EXACT.encode(sent)
    crossing.array("values").flags.writeable = False
    came = cluster.writable(crossing)
    assert came.dtype == dtype and torch.equal(came, sent)
    came += 1
    assert torch.equal(EXACT.decode(crossing), torch.arange(6).reshape(2, 3).to(dtype))


def test_lines_of_ray_about_lost_processes_are_not_shown_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: shown.extend(data["lines"]))
    before = worker.print_to_stdstream
    with cluster._without_lost_workers():
        for line in ("A worker died or was killed while executing a task by an error", "memory is short"):
            worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert shown == ["memory is short"]
    assert worker.print_to_stdstream is before


def test_the_session_lies_where_the_user_says_if_sockets_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        with cluster._session_folder() as folder:
            assert folder.parent == Path(short)
            assert folder.stat().st_mode & 0o077 == 0
        assert not folder.exists()


def test_folders_of_commands_that_were_killed_are_removed_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        killed, foreign, linked = (Path(short, f"fs-{name}") for name in ("killed", "foreign", "linked"))
        for folder in (killed, foreign):
            folder.mkdir()
        (killed / cluster._LOCK).touch()
        (killed / "ray").mkdir()
        linked.symlink_to(foreign)
        with cluster._session_folder() as one, cluster._session_folder() as another:
            assert one.exists() and another.exists()
            assert not killed.exists()
            assert foreign.exists() and linked.exists()
        assert not one.exists() and not another.exists()


def test_a_long_path_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with cluster._session_folder() as folder:
        assert len(str(folder.parent)) <= cluster._LONGEST_PLACE
        assert folder.parent != long


def test_the_longest_socket_below_the_longest_place_still_fits() -> None:
    """With as many digits as a process number can have on Linux."""
    assert str(2**22) in cluster._LONGEST_INNER
    assert cluster._LONGEST_PLACE + len(cluster._LONGEST_INNER) == 107
    assert len("/dev/shm") <= cluster._LONGEST_PLACE


def test_a_ray_of_the_users_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(cluster, "check_closed", lambda: None)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: stopped.append(True))
    with pytest.raises(cluster.ClusterFailed, match="connected to a Ray already"), cluster.running(workers=1):
        pass
    assert stopped == []


def test_a_ray_that_does_not_shut_down_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def hangs() -> None:
        asked.set()
        threading.Event().wait()

    monkeypatch.setattr(shutdown, "CLOSING_SECONDS", 0.1)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "shutdown", hangs)
    with cluster._connected(lambda: None):
        assert not asked.is_set()
    assert asked.wait(60)


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise RuntimeError("no luck\nand much more")

    monkeypatch.setattr(cluster, "check_closed", lambda: None)
    monkeypatch.setattr(cluster.ray, "init", fails)
    with pytest.raises(cluster.ClusterFailed, match=r"Ray does not start: no luck$"), cluster.running(workers=1):
        pass


def test_no_place_at_all_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(cluster.ClusterFailed, match="needs a writable folder"), cluster._session_folder():
        pass


SCRIPT = """
import os, sys, tempfile
from pathlib import Path
from fedsplit.environment import prepare
prepare()
from fedsplit import environment
from fedsplit.trunk import cluster
import psutil
import ray

@ray.remote
def where():
    return ray._private.worker._global_node.get_session_dir_path()

for _ in range(2):  # a second cluster in the same process
    with cluster.running(workers=1):
        session = Path(ray.get(where.remote()))
        outer = session.parent.parent
        assert outer.parent == Path("/tmp"), outer
        assert outer.stat().st_mode & 0o777 == 0o700, oct(outer.stat().st_mode)
        token = os.environ["RAY_AUTH_TOKEN"]
        commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
        assert commands and not [command for command in commands if token in command]
        logs = [path for path in outer.rglob("*") if path.is_file()]
        assert logs and not [path for path in logs if token.encode() in path.read_bytes()]
    assert not outer.exists()
print("gone")
"""


@pytest.mark.slow
def test_nothing_of_a_session_stays_and_nobody_else_may_enter_it(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    environment = {**os.environ, "TMPDIR": str(long)}
    call = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, "gone\n"), done.stderr


STARTS = """
import sys
from fedsplit.environment import prepare
prepare()
from fedsplit.commands.exit_codes import exit_code
from fedsplit import environment
from fedsplit.trunk import cluster

def work():
    print("starting", flush=True)
    with cluster.running(workers=1):
        print("started", flush=True)

sys.exit(exit_code(work))
"""


@pytest.mark.slow
def test_sigterm_is_heard_while_ray_starts(tmp_path: Path) -> None:
    """Ray's own handlers would end the process with 15 or a native stack trace, or would not end it at all."""
    root = Path(cluster.__file__).parents[2]
    call = [sys.executable, "-c", STARTS]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as command:
        assert command.stdout is not None and command.stderr is not None
        assert command.stdout.readline() == "starting\n"
        process = psutil.Process(command.pid)
        while not (servers := process.children(recursive=True)):
            assert command.poll() is None
            time.sleep(0.01)
        command.terminate()
        assert command.wait(timeout=30) == 143
        assert (command.stdout.read(), command.stderr.read()) == ("", "fedsplit: stopped\n")
    psutil.wait_procs(servers, timeout=10)
    assert [server for server in servers if server.is_running()] == []


def test_a_call_after_the_end_starts_no_second_ray() -> None:
    """A thread of Flower's may still call Ray when a run has been stopped."""
    script = (
        "from fedsplit.environment import prepare; prepare()\n"
        "import ray\n"
        "try:\n    ray.put(1)\n"
        "except ray.exceptions.RaySystemError:\n    print(ray.is_initialized())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = Path(cluster.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no.such.host.invalid:6379", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_named_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_own_token", "")
    with pytest.raises(cluster.ClusterFailed, match=f"^no Ray cluster answers at {address}: "), cluster.joined(address):
        raise AssertionError


def test_another_thread_waits_until_the_main_thread_has_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter((False, False, True))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: next(looks))
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.0)
    waiting = threading.Thread(target=cluster.wait_until_started, args=[60.0])
    waiting.start()
    waiting.join()
    assert next(looks, None) is None


def test_the_main_thread_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ServerApp of a deployment does, in whose process there is no Ray."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(cluster.ClusterFailed, match="started without a Ray"):
        cluster.wait_until_started(3600.0)


def test_nobody_waits_for_a_main_thread_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    ended = threading.Thread(target=lambda: None)
    monkeypatch.setattr(threading, "main_thread", lambda: ended)
    with pytest.raises(cluster.ClusterFailed, match="started without a Ray"):
        cluster.wait_until_started(3600.0)


def test_the_folder_of_a_plain_ray_is_closed_to_others_and_goes_with_the_process() -> None:
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as short:
        code = (
            "import os; from pathlib import Path; from fedsplit.trunk import cluster\n"
            "cluster.keep_session_folder()\n"
            "folder = Path(os.environ['RAY_TMPDIR'])\n"
            "print(folder, oct(folder.stat().st_mode & 0o077))"
        )
        env = {**os.environ, "TMPDIR": short}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        folder, mode = done.stdout.split()
        assert (Path(folder).parent, mode) == (Path(short), "0o0")
        assert not Path(folder).exists()
