"""The environment that libraries find: quiet, without telemetry, closed to others on the machine."""

from __future__ import annotations

import os
import secrets
import sys
import warnings
from pathlib import Path

from fedsplit.allowed import InputError

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    # How many compiled products oneDNN, and torch beside it, keep at once, of 0.6 MB each. Where batches differ in
    # length there would soon be the 1,024 that are usual; 32 are as fast.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}
"""The environment in which libraries show nothing of their own, and hold no more than they need."""


def quieten(offline: bool = True) -> None:
    """Sets what must be set before the libraries are imported, since they read it only then.

    Args:
        offline: Whether nothing may be asked of the Hub.
    """
    for name, value in {**QUIET, **({"HF_HUB_OFFLINE": "1"} if offline else {})}.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


ENVIRONMENT = {
    **QUIET,
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that wait sleep. They would burn their core otherwise, which client and trunk need in turn: with another
    # process on the machine, two threads each were six to ten times slower.
    "OMP_WAIT_POLICY": "passive",
    "RAY_worker_niceness": "0",  # Ray's workers would otherwise give way to anything else on the machine
    # Tensors up to this many bytes travel within the call; the detour over the object store takes a
    # quarter of a round's time with the default model.
    "RAY_max_direct_call_object_size": str(8 * 2**20),
    # Despite its name this decides on Linux, too: with 0 all of Ray's servers bind to the loopback interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""The environment of a command that starts processes, and of those: no telemetry, no chatter, no open port."""


def prefer_installed() -> None:
    """Has Python look for modules in the working folder last.

    `python -m` puts that folder first, so that a user's folder `datasets`, or a file `torch.py`, would be taken
    for the library of that name. The folder that fedsplit itself was loaded from keeps its place.
    """
    here, ours = Path.cwd().resolve(), Path(__file__).resolve().parent.parent
    last = [entry for entry in sys.path if Path(entry).resolve() == here != ours]
    sys.path[:] = [entry for entry in sys.path if entry not in last] + last[:1]


_ray_is_open = False


def check_closed() -> None:
    """Makes sure that a Ray that is started now asks for a token.

    Raises:
        InputError: Ray was imported before `prepare` had set one, and would not take it any more.
    """
    if _ray_is_open:
        raise InputError("ray was imported before fedsplit could close it: call fedsplit.environment.prepare() first")


def prepare() -> None:
    """Sets what must be set before the libraries are imported, since they read it only then.

    Without a token of its own, anyone on the machine could run code in Ray's processes.
    """
    global _ray_is_open
    _ray_is_open |= "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token"
    for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)
