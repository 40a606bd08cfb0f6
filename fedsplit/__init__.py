"""Federated split learning of causal language models, simulated faithfully.

`run` runs a federation, and `open` opens the folder of an earlier run:

>>> import fedsplit
>>> fedsplit.Config(clients=4).clients
4

`import fedsplit` loads no further module. Each public name loads its module at first use, so that
`python -m fedsplit --help` answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.api import open as open
    from fedsplit.api import run as run
    from fedsplit.errors import InputError as InputError
    from fedsplit.errors import SettingError as SettingError
    from fedsplit.result import Result as Result
    from fedsplit.settings.config import BUNDLED_MODEL as BUNDLED_MODEL
    from fedsplit.settings.config import Config as Config

__version__ = "0.1.0"

_HOMES = {
    "BUNDLED_MODEL": "fedsplit.settings.config",
    "Config": "fedsplit.settings.config",
    "InputError": "fedsplit.errors",
    "Result": "fedsplit.result",
    "SettingError": "fedsplit.errors",
    "open": "fedsplit.api",
    "run": "fedsplit.api",
}
"""Module of each public name."""

__all__ = ["BUNDLED_MODEL", "Config", "InputError", "Result", "SettingError", "__version__", "open", "run"]


def __getattr__(name: str) -> Any:  # Any, since the names are of many types, which the imports above declare
    """Loads a public name from its module.

    Raises:
        AttributeError: The package has no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Names that the package offers."""
    return sorted(__all__)
