"""A Ray of our own on this machine: closed to others, in a folder of its own, gone when it is no longer used."""

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
from ray.job_config import JobConfig
from torch import Tensor

import fedsplit
from fedsplit.shutdown import cleaned_up
from fedsplit.wire.codecs import EXACT
from fedsplit.wire.packets import Encoded

NAMESPACE = "fedsplit"
"""Ray's namespace of all named actors."""

_OBJECT_STORE = 512 * 2**20
"""Bytes of shared memory for tensors under way; those of a step are freed as it ends."""

_LONGEST_PLACE = 31
"""Letters of a path below which Ray's sockets still fit into the 107 bytes that Linux allows for their paths."""


class ClusterFailed(Exception):
    """Ray cannot be started on this machine; the message says why."""


def _places() -> Iterator[Path]:
    """Folders in which Ray's session may lie: the user's choice first, where its path is short enough."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(place)) <= _LONGEST_PLACE and os.access(place, os.W_OK | os.X_OK):
            yield Path(place)


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """A folder for Ray's session that nobody else may enter, since Ray makes what is in it writable for all.

    Raises:
        ClusterFailed: No folder for temporary files is usable.
    """
    place = next(_places(), None)
    if place is None:
        words = f"TMPDIR is {tempfile.gettempdir()}, and neither it nor /tmp can be used"
        raise ClusterFailed(f"Ray needs a writable folder with a path of at most {_LONGEST_PLACE} letters: {words}")
    folder = Path(tempfile.mkdtemp(prefix="fs-", dir=place))
    with cleaned_up(lambda: shutil.rmtree(folder, ignore_errors=True)):
        yield folder


def _job() -> JobConfig:
    """Keeps the working folder off the path of Ray's processes, where a user's `datasets.py` would hide the library.

    Only where fedsplit itself was loaded from the working folder must they look there.
    """
    here, ours = Path.cwd().resolve(), Path(fedsplit.__file__).resolve().parent.parent
    # Ray adds the working folder unless a job is said to come from its remote client; nothing else depends on that.
    return JobConfig(_client_job=True, _py_driver_sys_path=[str(here)] if here == ours else [])


@contextlib.contextmanager
def running(workers: int) -> Iterator[None]:
    """Runs a Ray on this machine for as long as the context lasts.

    Ray binds to the loopback interface and asks for a token where the environment says so, as
    `fedsplit.environment.prepare` has it.

    Args:
        workers: Client processes to have room for.

    Raises:
        ClusterFailed: Ray cannot be started here.
    """
    with _session_folder() as folder:
        on_terminate = signal.getsignal(signal.SIGTERM)
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
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray puts one of its own there, which aborts the process
            send_tensors_as_arrays()
            yield
        finally:
            if ray.is_initialized():
                ray.shutdown()


def send_tensors_as_arrays() -> None:
    """Has this process send tensors, wherever they are in what crosses by Ray, in place of torch's pickles of them."""
    ray.util.register_serializer(Tensor, serializer=EXACT.encode, deserializer=writable)


def writable(encoded: Encoded) -> Tensor:
    """A tensor that may be changed, unlike the memory it came in."""
    return EXACT.decode(encoded).clone()
