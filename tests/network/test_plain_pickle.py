"""A pickle of plain values is read, and one that names anything is refused before it is called."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.network import plain_pickle
from fedsplit.network.plain_pickle import read_plain

PLAIN = {1: {"computation": 50.5, "active": [1, 2], "model": "x", "on": True, "off": None}, "t": (1, "2")}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_bytes(pickle.dumps(PLAIN, protocol))
    assert read_plain(file) == PLAIN


class Touches:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_is_called(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    content = pickle.dumps({1: Touches(victim)})
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(InputError, match=r"is refused: it names .*; only plain values are read"):
        read_plain(tmp_path / "trace")
    assert not victim.exists()


@pytest.mark.parametrize(
    "value",
    [datetime.date(2030, 1, 2), print, b"".join, set],
    ids=["date", "function", "method", "class"],  # a method's text has an address, which differs between processes
)
def test_classes_and_functions_are_refused(value: object, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_bytes(pickle.dumps([value]))
    with pytest.raises(InputError, match="is refused"):
        read_plain(file)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(PLAIN)[:-9], b"Pid\n."])
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"is no pickle|is refused"):
        read_plain(file)


def test_missing_and_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_plain(tmp_path / "none")
    (tmp_path / "trace").write_bytes(pickle.dumps(PLAIN))
    monkeypatch.setattr(plain_pickle, "LARGEST", 8)
    with pytest.raises(InputError, match="too many for a trace"):
        read_plain(tmp_path / "trace")
