"""Environment variables for libraries: no output, no telemetry, no access for further users of the machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedsplit.errors import InputError

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "GRPC_VERBOSITY": "ERROR",  # a line for each failed handshake would go to the screen
    # Number of compiled products that oneDNN and torch keep, of 0.6 MB each. Batches of different lengths would soon
    # fill the default of 1,024. 32 are as fast.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}
"""Variables that silence the libraries, and limit their memory."""


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quieten(offline: bool = True) -> None:
    """Sets the variables that silence the libraries. Must be called before the libraries are imported.

    Args:
        offline: If true, the Hub is never contacted.
    """
    variables = dict(QUIET)
    if offline:
        variables["HF_HUB_OFFLINE"] = "1"
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    # `PYTHONWARNINGS` is for the processes that this one starts.
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports the library, which has no variable for it


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Makes files and folders that are written inside the context accessible to their user alone.

    Processes that are started inside the context inherit this. A umask that is stricter stays as strict. All threads of
    the process have the same umask.

    Example:
        >>> with private_files():
        ...     inside = os.umask(0o077)
        >>> inside & 0o077 == 0o077
        True
    """
    before = os.umask(0o077)  # a umask can be read only by setting it
    os.umask(before | 0o077)
    try:
        yield
    finally:
        os.umask(before)


ENVIRONMENT = {
    **QUIET,
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Waiting threads sleep. By default they spin on their core, which client and trunk need in turn: with another
    # process on the machine, two threads each were six to ten times slower.
    "OMP_WAIT_POLICY": "passive",
    "RAY_worker_niceness": "0",  # the default lets any other process of the machine go first
    # Tensors up to this many bytes travel inside the call. The object store would add a quarter to the time of a round
    # with the default model.
    "RAY_max_direct_call_object_size": str(8 * 2**20),
    # Despite its name this counts on Linux too: with 0 all of Ray's servers bind to the loopback interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Flower has a thread that may call Ray after our `ray.shutdown()`. By default the call would start a second Ray,
    # without a token.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""Variables of a command and of the processes that it starts: no telemetry, no output, no open port."""


def prefer_installed() -> None:
    """Moves the working folder to the end of Python's module search path.

    `python -m` puts the working folder first, so that a user's folder `datasets` or file `torch.py` would hide a
    library. If fedsplit itself was loaded from the working folder, the path stays unchanged.
    """
    here = Path.cwd().resolve()
    package_parent = Path(__file__).resolve().parent.parent
    if here == package_parent:
        return
    working = [entry for entry in sys.path if Path(entry).resolve() == here]
    others = [entry for entry in sys.path if entry not in working]
    sys.path[:] = others + working[:1]


_ray_is_open = False

_own_token = ""
"""Token of the private clusters that this process starts."""


def check_closed() -> None:
    """Makes sure that a Ray cluster started now will require a token.

    Raises:
        InputError: Ray was imported before `prepare` set the token, and reads the variable at import only.
    """
    if _ray_is_open:
        raise InputError("ray was imported before fedsplit could close it: call fedsplit.environment.prepare() first")


def check_open() -> None:
    """Makes sure that a cluster of others is not met with the token of our own private clusters.

    The cluster would take our driver's calls, and could not call back: all actors would end as they start.

    Raises:
        InputError: `prepare` has set a token in this process before.
    """
    if _own_token and os.environ.get("RAY_AUTH_TOKEN") == _own_token:
        words = "a cluster of others cannot be joined by a process that has started a private one: use a new process"
        raise InputError(f"ray.address: {words}")


ON_NODES = {
    name: value
    for name, value in ENVIRONMENT.items()
    if name in {*QUIET, "OMP_WAIT_POLICY", "FLWR_TELEMETRY_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"}
}
"""Variables of this program's processes on a Ray cluster of others, whose own settings stay as they are."""


def prepare(address: str = "local") -> None:
    """Sets the variables of a command that starts Ray. Must be called before the libraries are imported.

    The variables include a random token. Without a token, any user of the machine could run code in Ray's processes.
    A cluster of others has its own settings, and its own token or none.

    Args:
        address: The cluster, as in the setting `ray.address`.
    """
    global _ray_is_open, _own_token
    if address != "local":
        for name, value in {**ON_NODES, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}.items():
            os.environ.setdefault(name, value)
        return
    _ray_is_open |= "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token"
    if "RAY_AUTH_TOKEN" not in os.environ:
        _own_token = os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "token"}.items():
        os.environ.setdefault(name, value)
