"""Files with a token: written once, for the owner alone, and refused where others can read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.wire.token_files import own_token, read_token


def test_a_new_token_is_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    first, second = tmp_path / "first.token", tmp_path / "second.token"
    token = own_token(first)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert len(token) == 32
    assert own_token(first) == token == read_token(first)
    assert own_token(second) != token


@pytest.mark.parametrize("content", [b"", b"secret", b"ab" * 31, b"AB" * 32, b"\xff" * 64], ids=repr)
def test_another_file_is_no_token_and_its_content_is_not_shown(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="holds no token of fedsplit serve") as refused:
        read_token(path)
    shown = str(refused.value).replace(str(path), "")
    assert not content or content.decode(errors="replace") not in shown
    assert path.read_bytes() == content


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    own_token(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match="others than the owner can read the token"):
        own_token(path)


@pytest.mark.parametrize("use", [read_token, own_token])
def test_a_missing_folder_is_told_in_a_line(use: object, tmp_path: Path) -> None:
    assert callable(use)
    with pytest.raises(InputError, match=r"no/token: No such file or directory"):
        use(tmp_path / "no" / "token")


@pytest.mark.parametrize("use", [read_token, own_token])
def test_a_path_that_no_system_has_is_told_in_a_line(use: object) -> None:
    assert callable(use)
    with pytest.raises(InputError, match="embedded null"):
        use(Path("a\0b"))
