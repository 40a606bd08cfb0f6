"""Loads strategies, objectives and metrics by name: fedsplit's own, and a user's from a file or a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import fedsplit
from fedsplit.errors import SettingError

BUILTIN = "strategies"
"""The package of fedsplit's own strategies."""

OWN = "path/to/mine.py:Mine, or module:Class"
"""Form of a user's own name."""

OBJECT = "(...)"
"""End of the name of an object that was given from Python, and that no other process can make again."""


@dataclass(frozen=True)
class Kind:
    """A kind of thing that a setting names.

    Attributes:
        setting: Name of the setting; options are settings below it, such as `strategy.mu`.
        builtin: Returns fedsplit's own: names, and `module:Class` of each.
        allowed: All forms of a name in words, for messages.
        functions: Functions are taken, too, as they are.
    """

    setting: str
    builtin: Callable[[], Mapping[str, str]]
    allowed: str
    functions: bool = False


def builtin_package() -> ModuleType:
    """Returns the package `strategies` that was installed beside fedsplit.

    A folder or a file of that name in the working folder does not hide it.

    Raises:
        SettingError: The program has imported a module of its own under that name.
    """
    file = Path(fedsplit.__file__).parent.parent / BUILTIN / "__init__.py"
    known = sys.modules.get(BUILTIN)
    place = getattr(known, "__file__", None)
    if known is not None and place is not None:
        if not os.path.samefile(place, file):
            raise SettingError("strategy", place, "no other module named strategies, which would hide fedsplit's own")
        return known
    spec = importlib.util.spec_from_file_location(BUILTIN, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None
    sys.modules[BUILTIN] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def _strategies() -> Mapping[str, str]:
    package: Any = builtin_package()
    return package.STRATEGIES


STRATEGY = Kind("strategy", _strategies, f"a name from the package strategies, {OWN}")
"""Strategies, for `--strategy`."""


def find(kind: Kind, spec: str) -> Any:
    """Returns the class (or function) that a name stands for, without calling it.

    Args:
        kind: The kind of thing.
        spec: One of fedsplit's own names, `path/to/mine.py:Mine`, or `module:Class`.

    Raises:
        SettingError: There is no such thing, or its module cannot be imported.

    Example:
        >>> find(STRATEGY, "fedprox").__name__
        'FedProx'
    """
    place, colon, name = spec.rpartition(":")
    if colon and place.endswith(".py"):
        module = _import_file(kind, Path(place))
    elif colon:
        module = _import_module(kind, place, spec)
    else:
        names = kind.builtin()
        if spec not in names:
            builtin = [" | ".join(sorted(names))] if names else []
            raise SettingError(kind.setting, spec, ", ".join([*builtin, OWN]))
        place, _, name = names[spec].rpartition(":")
        module = _import_module(kind, place, spec)
    if not callable(getattr(module, name, None)):
        there = [n for n, v in vars(module).items() if _is_a(kind, v) and not n.startswith("_")]
        what = "a class or a function" if kind.functions else "a class"
        raise SettingError(kind.setting, spec, f"{what} of {place}: {', '.join(there) or 'it has none'}")
    return getattr(module, name)


def _is_a(kind: Kind, value: object) -> bool:
    return inspect.isclass(value) or (kind.functions and inspect.isfunction(value))


def _import_file(kind: Kind, path: Path) -> ModuleType:
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:8]
    name = f"fedsplit_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise SettingError(kind.setting, path, "a Python file that is there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass in the file looks its own module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises is the user's to see
        del sys.modules[name]
        words = f"a Python file that can be imported ({type(error).__name__}: {error})"
        raise SettingError(kind.setting, path, words) from error
    return module


def _import_module(kind: Kind, name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a name that is none, or whatever the module raises
        raise SettingError(kind.setting, spec, f"{kind.allowed} ({type(error).__name__}: {error})") from error


def make(kind: Kind, spec: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Makes the object that a name stands for.

    Args:
        kind: The kind of thing.
        spec: As for `find`.
        options: Keyword arguments that the user gave.
        defaults: Keyword arguments to pass where the class takes them and `options` does not hold them.

    Raises:
        SettingError: There is no such thing, or it does not take the options.

    Example:
        >>> make(STRATEGY, "fedprox", {"mu": 0.5}, {"seed": 0}).mu
        0.5
    """
    found = find(kind, spec)
    try:
        parameters = inspect.signature(found).parameters
        if kind.functions and not inspect.isclass(found):
            if options:
                name = next(iter(options))
                raise SettingError(f"{kind.setting}.{name}", options[name], f"no option, since {spec} is a function")
            return found
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if unknown := [name for name in options if name not in parameters and not takes_any]:
            known = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
            words = ", ".join(known) or "no option at all"
            raise SettingError(f"{kind.setting}.{unknown[0]}", options[unknown[0]], words)
        return found(**{**{name: value for name, value in defaults.items() if name in parameters}, **options})
    except SettingError:
        raise
    except Exception as error:  # whatever the user's class raises
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        named = next((name for name in options if what.startswith(f"{name} ")), None)
        if named is not None:
            words = f"what {spec} takes ({what})"
            raise SettingError(f"{kind.setting}.{named}", options[named], words) from error
        raise SettingError(kind.setting, spec, f"options that it takes ({what})") from error


def described(error: BaseException) -> str:
    """Returns an error of a user's code in one line: its kind, its message, and where it was raised.

    Example:
        >>> try:
        ...     {}["rate"]
        ... except KeyError as error:
        ...     described(error).partition(" (")[0]
        "KeyError: 'rate'"
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}"
