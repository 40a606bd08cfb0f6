"""Ray: a private one of this machine, closed to further users, or a cluster that others have started."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import utils, worker
from ray.job_config import JobConfig
from torch import Tensor

import fedsplit
from fedsplit.environment import ON_NODES, check_closed, check_open
from fedsplit.errors import first_line
from fedsplit.shutdown import bounded, cleaned_up
from fedsplit.wire.casting import EXACT
from fedsplit.wire.encoded import Encoded

NAMESPACE = "fedsplit"
"""Namespace of all named actors."""

_OBJECT_STORE = 512 * 2**20
"""Bytes of shared memory for tensors on the way. The end of a step frees the step's tensors."""

_CONNECT_SECONDS = 5.0
"""Time that a cluster has to take a connection."""

_LOOK_SECONDS = 0.1
"""Time between two looks at whether another thread has connected to a Ray."""

_PREFIX = "fs-"
"""Beginning of the names of folders for Ray's sessions."""

_LOCK = "lock"
"""File in such a folder that is locked for as long as the command runs."""

_LONGEST_PATH = 107
"""Longest path of a socket in bytes, on Linux."""

_LONGEST_INNER = "/fs-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest path of a Ray socket below the folder for temporary files, with the largest possible process number."""

_LONGEST_PLACE = _LONGEST_PATH - len(_LONGEST_INNER)
"""Longest path of the folder for temporary files, in bytes."""


_LOST_PROCESS = ("A worker died or was killed while executing a task", "The node with node id")
"""Beginnings of Ray's lines about a process that is gone."""


class ClusterFailed(Exception):
    """Ray cannot be started on this machine; the message gives the reason."""


def _places() -> Iterator[Path]:
    """Yields possible folders for Ray's session: the user's choice first, if the path is short enough."""
    for place in (os.environ.get("TMPDIR", "/tmp"), "/tmp", "/var/tmp", "/dev/shm"):
        is_short = len(os.fsencode(place)) <= _LONGEST_PLACE
        if place and is_short and os.access(place, os.W_OK | os.X_OK):
            yield Path(place)


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """Makes a folder for Ray's session. No further user may enter, since Ray makes the contents writable for all.

    Folders of commands that were killed are removed first.

    Raises:
        ClusterFailed: No folder for temporary files is usable.
    """
    place = next(_places(), None)
    if place is None:
        words = f"TMPDIR is {os.environ.get('TMPDIR', 'not set')}, and neither it nor /tmp can be used"
        raise ClusterFailed(f"Ray needs a writable folder with a path of at most {_LONGEST_PLACE} letters: {words}")
    for left in place.glob(f"{_PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    with cleaned_up(lambda: shutil.rmtree(folder, ignore_errors=True)), open(folder / "draft", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees the lock however this process ends
        os.rename(folder / "draft", folder / _LOCK)  # under its name the file is locked from the beginning
        yield folder


def _is_abandoned(folder: Path) -> bool:
    """Returns True for a folder of a command of this user that has ended without removing the folder."""
    with contextlib.suppress(OSError):
        # Any user may write to /tmp. A link or a folder of another user's must never be removed.
        is_own = folder.lstat().st_uid == os.geteuid() and not folder.is_symlink()
        if is_own:
            with open(folder / _LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the command runs
            return True
    return False


def _job() -> JobConfig:
    """Keeps the working folder off the path of Ray's processes, where a user's `datasets.py` would hide the library.

    The working folder stays on the path only if fedsplit itself was loaded from the working folder.
    """
    here = Path.cwd().resolve()
    ours = Path(fedsplit.__file__).resolve().parent.parent
    search_path = [str(here)] if here == ours else []
    # Ray adds the working folder, except to jobs of Ray's remote client. Nothing else depends on `_client_job`.
    return JobConfig(_client_job=True, _py_driver_sys_path=search_path)


@contextlib.contextmanager
def running(workers: float) -> Iterator[None]:
    """Runs a Ray on this machine until the end of the context.

    Ray binds to the loopback interface and asks for a token, because of environment variables from
    `fedsplit.environment.prepare`.

    Args:
        workers: Number of CPUs that Ray may deal out, one for each client process.

    Raises:
        ClusterFailed: Ray cannot be started here, or this process is connected to a different Ray.
        InputError: Ray was imported before it could be closed to others.
    """
    check_closed()
    if ray.is_initialized():
        raise ClusterFailed("this process is connected to a Ray already; call ray.shutdown() before a run")
    # Lines about processes that the run ends come until Ray has shut down.
    with _session_folder() as folder, _without_lost_workers(), _connected(lambda: _start(workers, folder)):
        yield


def keep_session_folder() -> None:
    """Makes a Ray that this process starts by a plain `ray.init()` use a folder that no further user may enter.

    The folder is removed when the process ends, or else by the next command that starts a Ray.

    Raises:
        ClusterFailed: No folder for temporary files is usable.
    """
    lasting = contextlib.ExitStack()
    folder = lasting.enter_context(_session_folder())
    atexit.register(lasting.close)
    os.environ["RAY_TMPDIR"] = str(folder)


def wait_until_started(seconds: float) -> None:
    """Waits until the main thread of this process has connected to a Ray.

    Args:
        seconds: Longest wait.

    Raises:
        ClusterFailed: The main thread has not connected in time, has ended, or is the caller itself.
    """
    until = time.monotonic() + seconds
    main = threading.main_thread()
    while not ray.is_initialized():
        if time.monotonic() > until or not main.is_alive() or main is threading.current_thread():
            raise ClusterFailed("this process was started without a Ray, which plays clients and trunk")
        time.sleep(_LOOK_SECONDS)


@contextlib.contextmanager
def joined(address: str, ship: bool = False) -> Iterator[None]:
    """Connects to a cluster that others have started, until the end of the context. The cluster goes on after it.

    A connection that this process has already is used as it is, and kept.

    Args:
        address: "auto" or HOST:PORT.
        ship: True to bring the code of fedsplit to the nodes.

    Raises:
        ClusterFailed: There is no such cluster, or the connection that this process has is to a different one.
    """
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in ("auto", there):
            raise ClusterFailed(f"this process is connected to the Ray at {there}, and not to {address}")
        send_tensors_as_arrays()
        yield
        return
    with _connected(lambda: _connect(address, ship)):
        yield


@contextlib.contextmanager
def _connected(connect: Callable[[], None]) -> Iterator[None]:
    """Keeps this process connected to a Ray until the end of the context.

    Args:
        connect: Starts a Ray, or connects to one.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _keeping_sigterm():
            connect()
        # Ray's native code sets a handler that aborts the process. Only the main thread may set one.
        if threading.current_thread() is threading.main_thread() and on_terminate is not None:
            signal.signal(signal.SIGTERM, on_terminate)
        send_tensors_as_arrays()
        yield
    finally:
        if ray.is_initialized():
            bounded(ray.shutdown)  # its native threads may wait for each other


def _connect(address: str, ship: bool) -> None:
    """Connects to a cluster.

    Raises:
        ClusterFailed: There is none.
        InputError: This process has a token of its own for a Ray, which the cluster does not know.
    """
    check_open()
    _check_somebody_listens(address)
    package = Path(fedsplit.__file__).resolve().parent
    environment: dict[str, Any] = {"env_vars": dict(ON_NODES)}
    if ship:
        environment["py_modules"] = [str(package), str(package.parent / "strategies")]
    try:
        with _unheard():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                # Named actors are found by name within a namespace. Without one, each driver would have a random
                # namespace.
                namespace=NAMESPACE,
                job_config=JobConfig(_py_driver_sys_path=[]),
                runtime_env=environment,
            )
    except (OSError, RuntimeError, ValueError, ConnectionError, ray.exceptions.RayError) as error:
        hint = "a cluster that asks for a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, too"
        raise ClusterFailed(f"no Ray cluster answers at {address}: {first_line(error)}; {hint}") from error


def _check_somebody_listens(address: str) -> None:
    """Makes sure that a port is open: Ray tries for half a minute, and writes lines of its own meanwhile.

    Args:
        address: "auto", for which Ray finds out at once, or HOST:PORT.

    Raises:
        ClusterFailed: Nobody listens there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()  # brackets of an IPv6 address
    except (OSError, OverflowError) as error:
        raise ClusterFailed(f"no Ray cluster answers at {address}: {first_line(error)}") from error


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keeps Ray's Python code from replacing the handler of SIGTERM.

    A start takes seconds. A SIGTERM in these seconds would meet Ray's handler, and end with exit code 15 or not at all.
    """
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keeps Ray from printing the cluster's messages between those of the run, such as a log of a lost node."""
    listen = worker.listen_error_messages
    worker.listen_error_messages = lambda *arguments: None
    try:
        yield
    finally:
        worker.listen_error_messages = listen


def _start(workers: float, folder: Path) -> None:
    """Starts Ray.

    Raises:
        ClusterFailed: Ray does not start.
    """
    try:
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            namespace=NAMESPACE,
            object_store_memory=_OBJECT_STORE,
            _temp_dir=str(folder / "ray"),
            job_config=_job(),
        )
    except (OSError, RuntimeError, ValueError, ConnectionError, ray.exceptions.RayError) as error:
        raise ClusterFailed(f"Ray does not start: {first_line(error)}") from error


@contextlib.contextmanager
def _without_lost_workers() -> Iterator[None]:
    """Keeps Ray from showing long lines about dead processes. The run reports a loss in a line of the run's log.

    Further lines of Ray's are still shown, such as warnings of short memory.
    """
    show = getattr(worker, "print_to_stdstream", None)
    if show is None:  # a version of Ray without the function; the long lines are shown
        yield
        return

    def show_others(data: dict[str, Any], *rest: Any, **named: Any) -> None:
        lines = [line for line in data["lines"] if not line.startswith(_LOST_PROCESS)]
        if lines:
            show({**data, "lines": lines}, *rest, **named)

    worker.print_to_stdstream = show_others
    try:
        yield
    finally:
        worker.print_to_stdstream = show


def send_tensors_as_arrays() -> None:
    """Makes this process send all tensors through Ray as arrays, in place of torch's pickles of tensors."""
    ray.util.register_serializer(Tensor, serializer=EXACT.encode, deserializer=writable)


def writable(encoded: Encoded) -> Tensor:
    """Returns a copy of an array as a tensor. The array itself lies in Ray's memory, which is read-only."""
    return EXACT.decode(encoded).clone()
