"""`fedsplit new`: makes a project with a strategy, an objective and data of the user's own."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsplit.commands.exit_codes import exit_code
from fedsplit.durable import NotWritten, write_folder
from fedsplit.errors import InputError, SettingError
from fedsplit.settings.command_line import Parser

TEMPLATE = Path(__file__).parent.parent / "project_template"
"""The project to copy. Its files run as they are, under the name `my-project`."""

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

_HIDDEN = {"gitignore": ".gitignore"}
"""New names of files that would change how git or the installer treats the template itself."""


def check(folder: Path) -> None:
    """Checks that a project of a folder's name can be made in the folder.

    Raises:
        SettingError: The name is no name of a project, a module of the name is installed, or the folder exists.

    Example:
        >>> check(Path("my-wards"))
        >>> check(Path("My wards"))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: project: My wards is not possible; allowed: a name of small letters, digits and \
hyphens, such as my-wards
    """
    name = folder.absolute().name
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise SettingError("project", folder, "a name of small letters, digits and hyphens, such as my-wards")
    module = _module_of(name)
    # Python would import one of the two, and nobody could tell which one.
    if module in sys.stdlib_module_names or _is_installed(module):
        raise SettingError("project", folder, f"a name that no installed module has, which {module} has")
    if folder.exists():
        raise SettingError("project", folder, "a folder that does not exist yet")


def make(folder: Path) -> list[Path]:
    """Makes a project.

    Args:
        folder: Folder of the project. The last part of the path is the project's name.

    Returns:
        The files of the project, relative to the folder.

    Raises:
        InputError: The project cannot be made (see `check`), or the disk refuses the files. Nothing is left then.
    """
    check(folder)
    name = folder.absolute().name
    texts = {}
    for source in sorted(TEMPLATE.rglob("*")):
        place = source.relative_to(TEMPLATE)
        # Python may have left compiled modules of the template.
        if source.is_file() and "__pycache__" not in place.parts:
            file = place.with_name(_HIDDEN.get(place.name, place.name))
            text = _renamed(source.read_text(encoding="utf-8"), name)
            texts[Path(_renamed(str(file), name))] = text

    def fill(draft: Path) -> None:
        for file, text in texts.items():
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            (draft / file).write_text(text, encoding="utf-8")

    try:
        write_folder(folder, fill)
    except NotWritten as error:
        raise InputError(str(error)) from error
    return list(texts)


def _renamed(text: str, name: str) -> str:
    """Returns a text of the template with the names of a project."""
    return text.replace("my_project", _module_of(name)).replace("my-project", name)


def _module_of(name: str) -> str:
    """Returns the name of a project's module.

    Example:
        >>> _module_of("my-wards")
        'my_wards'
    """
    return name.replace("-", "_")


def _is_installed(module: str) -> bool:
    """Returns True if Python would import a module of the name. A folder without Python files is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="fedsplit new",
        description="Makes a project with a strategy, an objective and data of your own, which run as they are. "
        "`fedsplit simulate` and Flower's `flwr run` both run the project.",
        allow_abbrev=False,
    )
    parser.add_argument("project", type=Path, help="folder to make; its name is the project's, such as my-wards")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        folder: Path = make_parser().read(argv).checked().project
        for file in make(folder):
            print(folder / file)
        print(f"\nnext: cd {folder}; pip install --editable . ; fedsplit simulate --config run.toml")

    return exit_code(work, argv)
