"""Versions of what computes a run's numbers."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("fedsplit", "torch", "transformers", "peft", "flwr", "ray", "datasets", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Returns the versions of Python, fedsplit and its libraries, by name; those that are not installed are left out.

    Example:
        >>> versions()["python"].startswith("3.")
        True
    """
    return dict(_found(LIBRARIES))


@functools.cache
def _found(libraries: tuple[str, ...]) -> dict[str, str]:
    """Looks the versions up once: to read the packages' files takes 10 ms, and every checkpoint has the versions."""
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # Ray and Flower are not needed by all engines
            continue
    return found
