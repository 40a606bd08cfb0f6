"""Loads strategies, objectives and metrics by name, from fedsplit, from a user's file or from a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import fedsplit
from fedsplit.errors import SettingError

BUILTIN = "strategies"
"""Package with the strategies that come with fedsplit."""

OWN = "path/to/mine.py:Mine, or module:Class"
"""Form of the name of a user's class."""

OBJECT = "(...)"
"""End of a name that stands for an object from Python, which no further process can make again."""


class StrategyPackage(Protocol):
    """The module `strategies`."""

    @property
    def STRATEGIES(self) -> Mapping[str, str]:  # a constant of a module
        """`module:Class` of each strategy, by name."""
        ...


@dataclass(frozen=True)
class Kind:
    """What a setting's names stand for, such as strategies or metrics.

    Attributes:
        setting: Name of the setting. Error messages name an option as `setting.option`, such as `strategy.mu`.
        builtin: Returns `module:Class` by name for everything that comes with fedsplit.
        allowed: All forms of a name in words, for messages.
        functions: True if a name may also stand for a function, which is used as it is.
    """

    setting: str
    builtin: Callable[[], Mapping[str, str]]
    allowed: str
    functions: bool = False


def builtin_package() -> StrategyPackage:
    """Returns the package `strategies` that was installed beside fedsplit.

    A folder or file `strategies` in the working folder cannot hide the package.

    Raises:
        SettingError: The program has imported a different module named `strategies`.

    Example:
        >>> builtin_package().STRATEGIES["fedprox"]
        'strategies.fedprox:FedProx'
    """
    file = Path(fedsplit.__file__).parent.parent / BUILTIN / "__init__.py"
    known = sys.modules.get(BUILTIN)
    place = getattr(known, "__file__", None)
    if known is not None and place is not None:
        if not os.path.samefile(place, file):
            raise SettingError("strategy", place, "no other module named strategies, which would hide fedsplit's own")
        return cast(StrategyPackage, known)
    spec = importlib.util.spec_from_file_location(BUILTIN, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[BUILTIN] = package  # before the module runs, as Python's import does it
    spec.loader.exec_module(package)
    return cast(StrategyPackage, package)


STRATEGY = Kind(
    setting="strategy",
    builtin=lambda: builtin_package().STRATEGIES,
    allowed=f"a name from the package strategies, {OWN}",
)
"""Strategies, for `--strategy`."""


def find(kind: Kind, spec: str) -> Any:
    """Returns the class or function that a name stands for.

    Args:
        kind: What the name stands for.
        spec: The name of a class that comes with fedsplit, `path/to/mine.py:Mine`, or `module:Class`.

    Raises:
        SettingError: There is no such class, or its module cannot be imported.

    Example:
        >>> find(STRATEGY, "fedprox").__name__
        'FedProx'
    """
    place, colon, name = spec.rpartition(":")
    if (file := file_of(spec)) is not None:
        module = _import_file(kind, file)
    elif colon:
        module = _import_module(kind, place, spec)
    else:
        names = kind.builtin()
        if spec not in names:
            builtin = [" | ".join(sorted(names))] if names else []
            raise SettingError(kind.setting, spec, ", ".join([*builtin, OWN]))
        place, _, name = names[spec].rpartition(":")
        module = _import_module(kind, place, spec)
    found = getattr(module, name, None)
    if not callable(found):
        candidates = ", ".join(_public_names(kind, module)) or "it has none"
        what = "a class or a function" if kind.functions else "a class"
        raise SettingError(kind.setting, spec, f"{what} of {place}: {candidates}")
    return found


def _public_names(kind: Kind, module: ModuleType) -> list[str]:
    """Returns the names in a module that the setting could have meant."""
    names = []
    for name, value in vars(module).items():
        is_right = inspect.isclass(value) or (kind.functions and inspect.isfunction(value))
        if is_right and not name.startswith("_"):
            names.append(name)
    return names


def _import_file(kind: Kind, path: Path) -> ModuleType:
    """Imports a user's file.

    Raises:
        SettingError: There is no such file, or an error was raised while it ran.
    """
    # Two files of one name in different folders must not become one module.
    place = os.fsencode(os.path.abspath(path))
    digest = hashlib.sha256(place).hexdigest()[:8]
    name = f"fedsplit_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise SettingError(kind.setting, path, "a Python file that is there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before the module runs: a dataclass in the file looks up its module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        words = f"a Python file that can be imported ({type(error).__name__}: {error})"
        raise SettingError(kind.setting, path, words) from error
    return module


def _import_module(kind: Kind, name: str, spec: str) -> ModuleType:
    """Imports an installed module.

    Raises:
        SettingError: There is no such module, or an error was raised while it ran.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise SettingError(kind.setting, spec, f"{kind.allowed} ({type(error).__name__}: {error})") from error


def name_of(spec: str) -> str:
    """Returns the short form of a name: that of the class or function itself.

    Example:
        >>> name_of("token_accuracy"), name_of("path/to/mine.py:rouge")
        ('token_accuracy', 'rouge')
    """
    return spec.removesuffix(OBJECT).rpartition(":")[2]


def file_of(spec: str) -> Path | None:
    """Returns the user's file that a name refers to; None for a class of fedsplit's, or of an installed module.

    Example:
        >>> file_of("path/to/mine.py:Mine")
        PosixPath('path/to/mine.py')
        >>> file_of("fedavg"), file_of("flwr.serverapp.strategy:FedAdam")
        (None, None)
    """
    place, colon, _ = spec.rpartition(":")
    return Path(place) if colon and place.endswith(".py") else None


def options_by_name(kind: Kind, specs: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the keyword arguments of several classes by the short form of their names.

    Args:
        kind: What the names stand for.
        specs: The names, as for `find`.
        options: Keyword arguments from the user, by NAME.KEY.

    Raises:
        SettingError: An option is for none of the names.

    Example:
        >>> options_by_name(STRATEGY, ["fedprox", "krum"], {"fedprox.mu": 0.5})
        {'fedprox': {'mu': 0.5}, 'krum': {}}
    """
    by_name: dict[str, dict[str, Any]] = {name_of(spec): {} for spec in specs}
    for option, value in options.items():
        name, _, key = option.partition(".")
        if name not in by_name:
            allowed = f"an option of {' | '.join(by_name)}" if by_name else f"no option, since {kind.setting} is empty"
            raise SettingError(f"{kind.setting}.{option}", value, allowed)
        by_name[name][key] = value
    return by_name


def make(
    kind: Kind,
    spec: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    setting: str | None = None,
) -> Any:
    """Calls the class that a name stands for, and returns the object. A function is returned as it is.

    Args:
        kind: What the name stands for.
        spec: The name, as for `find`.
        options: Keyword arguments from the user.
        defaults: Further keyword arguments. Each is passed if the class takes it and `options` lacks it.
        setting: What the user wrote before an option, for messages; None for the setting itself.

    Raises:
        SettingError: There is no such class, or the class refuses the options.

    Example:
        >>> make(STRATEGY, "fedprox", {"mu": 0.5}, {"seed": 0}).mu
        0.5
    """
    setting = setting or kind.setting
    found = check_options(kind, spec, options, setting)
    if kind.functions and not inspect.isclass(found):
        return found
    try:
        parameters = inspect.signature(found).parameters
        fitting_defaults = {name: value for name, value in defaults.items() if name in parameters}
        return found(**{**fitting_defaults, **options})
    except SettingError:
        raise
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        # A message such as "mu must not be negative" begins with the option at fault.
        option = next((name for name in options if what.startswith(f"{name} ")), None)
        if option is not None:
            words = f"what {spec} takes ({what})"
            raise SettingError(f"{setting}.{option}", options[option], words) from error
        raise SettingError(kind.setting, spec, f"options that it takes ({what})") from error


def check_options(
    kind: Kind,
    spec: str,
    options: Mapping[str, Any],
    setting: str,
) -> Any:
    """Makes sure that a class takes the user's options, without calling the class.

    Args:
        kind: What the name stands for.
        spec: The name, as for `find`.
        options: Keyword arguments from the user.
        setting: What the user wrote before an option, for messages.

    Returns:
        The class or function.

    Raises:
        SettingError: There is no such class, or an option is no parameter of the class.
    """
    found = find(kind, spec)
    if kind.functions and not inspect.isclass(found):
        for option, value in options.items():
            raise SettingError(f"{setting}.{option}", value, f"no option, since {spec} is a function")
        return found
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # a class in C may not tell its parameters
        return found
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [parameter.name for parameter in parameters if parameter.kind in by_keyword]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)  # **options
    for option, value in options.items():
        if option not in known and not takes_all:
            raise SettingError(f"{setting}.{option}", value, ", ".join(known) or "no option at all")
    return found


def described(error: BaseException) -> str:
    """Returns an error of a user's code in one line: class, message, and the last file and line of the user's.

    A library that the user's code calls may have raised the error. An error that fedsplit raised itself, as the code
    returned an impossible value, has no place.

    Example:
        >>> try:
        ...     {}["rate"]
        ... except KeyError as error:
        ...     described(error).partition(" (")[0]
        "KeyError: 'rate'"
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    # Without a frame of the user's, as for a class of a library, the library's own place is all there is.
    users = [frame for frame in frames if not _is_of_library(frame.filename)] or frames
    place = f" ({Path(users[-1].filename).name}, line {users[-1].lineno})" if users else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}"


def _is_ours(file: str) -> bool:
    """Returns True for a file of the package fedsplit."""
    return Path(fedsplit.__file__).parent in Path(file).parents


def _is_of_library(file: str) -> bool:
    """Returns True for a file of an installed package or of Python itself."""
    places = sysconfig.get_paths()
    homes = {Path(places[name]) for name in ("stdlib", "purelib", "platlib")}
    return not homes.isdisjoint(Path(file).parents)
