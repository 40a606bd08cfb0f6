"""Starts and stops a private Ray on this machine, closed to further users, in a folder that is removed at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._private import utils
from ray.job_config import JobConfig
from torch import Tensor

import fedsplit
from fedsplit.environment import check_closed
from fedsplit.errors import first_line
from fedsplit.shutdown import cleaned_up
from fedsplit.wire.casting import EXACT
from fedsplit.wire.encoded import Encoded

NAMESPACE = "fedsplit"
"""Namespace of all named actors."""

_OBJECT_STORE = 512 * 2**20
"""Bytes of shared memory for tensors under way; a step frees its own when it ends."""

_LONGEST_PATH = 107
"""Longest path of a socket in bytes, on Linux."""

_LONGEST_INNER = "/fs-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest path of a Ray socket below the folder for temporary files, with the largest number that a process has."""

_LONGEST_PLACE = _LONGEST_PATH - len(_LONGEST_INNER)
"""Longest path of that folder in bytes."""


class ClusterFailed(Exception):
    """Ray cannot be started on this machine; the message gives the reason."""


def _places() -> Iterator[Path]:
    """Yields folders that may hold Ray's session: the user's choice first, if its path is short enough."""
    for place in (os.environ.get("TMPDIR", "/tmp"), "/tmp", "/var/tmp", "/dev/shm"):
        if place and len(os.fsencode(place)) <= _LONGEST_PLACE and os.access(place, os.W_OK | os.X_OK):
            yield Path(place)


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """Makes a folder for Ray's session that no other user may enter, since Ray makes its contents writable for all.

    Raises:
        ClusterFailed: No folder for temporary files is usable.
    """
    place = next(_places(), None)
    if place is None:
        words = f"TMPDIR is {os.environ.get('TMPDIR', 'not set')}, and neither it nor /tmp can be used"
        raise ClusterFailed(f"Ray needs a writable folder with a path of at most {_LONGEST_PLACE} letters: {words}")
    folder = Path(tempfile.mkdtemp(prefix="fs-", dir=place))
    with cleaned_up(lambda: shutil.rmtree(folder, ignore_errors=True)):
        yield folder


def _job() -> JobConfig:
    """Keeps the working folder off the path of Ray's processes, where a user's `datasets.py` would hide the library.

    It stays on the path only if fedsplit itself was loaded from there.
    """
    here, ours = Path.cwd().resolve(), Path(fedsplit.__file__).resolve().parent.parent
    # Ray adds the working folder unless a job is said to come from its remote client; nothing else depends on that.
    return JobConfig(_client_job=True, _py_driver_sys_path=[str(here)] if here == ours else [])


@contextlib.contextmanager
def running(workers: int) -> Iterator[None]:
    """Runs a Ray on this machine for as long as the context lasts.

    Ray binds to the loopback interface and asks for a token, as the environment variables that
    `fedsplit.environment.prepare` sets tell it to.

    Args:
        workers: Number of client processes to have room for.

    Raises:
        ClusterFailed: Ray cannot be started here, or this process is connected to a different Ray.
        InputError: Ray was imported before it could be closed to others.
    """
    check_closed()
    if ray.is_initialized():
        raise ClusterFailed("this process is connected to a Ray already; call ray.shutdown() before a run")
    with _session_folder() as folder:
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            with _keeping_sigterm():
                _start(workers, folder)
            if threading.current_thread() is threading.main_thread() and on_terminate is not None:
                signal.signal(signal.SIGTERM, on_terminate)  # Ray's native code puts one there that aborts the process
            send_tensors_as_arrays()
            yield
        finally:
            if ray.is_initialized():
                ray.shutdown()


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keeps Ray from replacing the handler of SIGTERM: a start takes seconds, and Ray's exits with 15 or never ends."""
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler


def _start(workers: int, folder: Path) -> None:
    """Starts Ray.

    Raises:
        ClusterFailed: It does not start.
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


def send_tensors_as_arrays() -> None:
    """Makes this process send all tensors through Ray as arrays, in place of torch's pickles of them."""
    ray.util.register_serializer(Tensor, serializer=EXACT.encode, deserializer=writable)


def writable(encoded: Encoded) -> Tensor:
    """Returns a copy of an array as a tensor. Ray's memory, in which the array arrived, may not be written to."""
    return EXACT.decode(encoded).clone()
