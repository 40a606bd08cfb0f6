"""Durable writes: after a crash, a file or folder has either its new content or its previous content, complete.

The new content is written to a draft beside its target, synced, and renamed, since a rename is atomic.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

_MOST_AT_ONCE = 16
"""Most files of a folder that are synced at once."""


class NotWritten(OSError):
    """A file or folder could not be written, for example to a full disk. The message names the path and the reason."""


class Postponed(NotWritten):
    """A file could not be written now, and will be tried again later. The message says so."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns every error while a path is written into one error that names the path.

    Args:
        path: The file or folder that the context writes.

    Raises:
        NotWritten: The operating system or the safetensors library reported an error.

    Example:
        >>> with writing(Path("metrics.jsonl")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        fedsplit.durable.NotWritten: metrics.jsonl could not be written (No space left on device); what was there \
before is whole
    """
    try:
        yield
    except NotWritten:
        raise  # from an inner call, which has named its own path
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = re.sub(r"^.*I/O error: |\s*\(os error \d+\)$", "", reason)  # as safetensors reports a full disk
        raise NotWritten(f"{path} could not be written ({reason}); what was there before is whole") from error


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_here(path: str, flags: int) -> int:
    """Opens a file for `open(..., opener=open_here)`. A symbolic link is not followed, and is an OSError.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "link").symlink_to(folder / "elsewhere")
        >>> open(folder / "link", "w", opener=open_here)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        OSError: [Errno 40] Too many levels of symbolic links: ...
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_secret(path: Path, content: bytes) -> None:
    """Writes a new file that its owner alone may read, from the first byte on.

    Args:
        path: The file, which does not exist.
        content: The content.

    Raises:
        FileExistsError: There is such a file.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.token"
        >>> write_secret(path, b"secret")
        >>> oct(path.stat().st_mode)
        '0o100600'
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replaces a file in one step. The caller writes the draft; at the end of the context the draft becomes the file.

    Args:
        path: The file.

    Yields:
        The draft to write, beside the file.

    Raises:
        NotWritten: The file could not be written. The previous version is unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "summary.json"
        >>> with replacing(path) as draft:
        ...     draft.write_text("{}")
        2
        >>> path.read_text()
        '{}'
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # by process, as several may write the same file
    with writing(path):
        try:
            draft.unlink(missing_ok=True)  # a symbolic link would be followed
            yield draft
            sync(draft)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step.

    Args:
        path: The file. Its folder must exist.
        text: The new content.

    Raises:
        NotWritten: The file could not be written. The previous version is unchanged.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replaces a folder in one step.

    Args:
        target: The folder.
        fill: Writes the new content into the empty draft folder that it is called with.

    Raises:
        NotWritten: The folder could not be written. The previous version is unchanged.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "adapter"
        >>> write_folder(target, lambda draft: (draft / "rank").write_text("8"))
        >>> (target / "rank").read_text()
        '8'
    """
    draft = target.with_name(f".{target.name}.draft")
    before = target.with_name(f".{target.name}.before")

    with writing(target):
        _recover(target, before)
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            fill(draft)
            # The files before the rename, which must never show a file without content. All at once: the disk writes
            # its journal once for several files, and once more for each that waits for the one before.
            files = list(draft.rglob("*"))
            with ThreadPoolExecutor(_MOST_AT_ONCE) as threads:
                for _ in threads.map(sync, files):  # raises the error of a file
                    pass
            sync(draft)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

        # A folder cannot be renamed onto a non-empty folder. The old version steps aside first; if the process dies
        # between the two renames, the next call brings the old version back.
        if target.exists():
            target.rename(before)
        draft.rename(target)
        sync(target.parent)
        shutil.rmtree(before, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder in one step: it is there whole, or its name is gone.

    Raises:
        NotWritten: The folder could not be removed. It is unchanged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> remove_folder(folder)
        >>> folder.exists()
        False
    """
    removed = path.with_name(f".{path.name}.removed")
    with writing(path):
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def tidy(root: Path) -> list[Path]:
    """Removes what calls of this module left unfinished in a folder, at any depth, as a process was killed.

    A previous version that has stepped aside for a new one that never came is put back.

    Args:
        root: The folder. Nobody may be writing in it.

    Returns:
        The drafts that were removed.
    """
    for before in sorted(root.rglob(".*.before")):
        _recover(before.with_name(before.name.removeprefix(".").removesuffix(".before")), before)
    drafts = [path for ending in ("draft", "removed") for path in sorted(root.rglob(f".*.{ending}"))]
    drafts = [path for path in drafts if not {*path.parents} & {*drafts}]  # a draft inside another one goes with it
    for draft in drafts:
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft)
        else:
            draft.unlink()
    return drafts


def _recover(target: Path, before: Path) -> None:
    """Restores the previous version of a folder if a process died between the two renames of `write_folder`."""
    if before.exists() and not target.exists():
        before.rename(target)
    shutil.rmtree(before, ignore_errors=True)
