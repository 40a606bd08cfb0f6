"""Layout of a set of certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.wire.certificate_set import write_set
from fedsplit.wire.set_layout import folder_of, names_in
from fedsplit.wire.tls import CERTIFICATE


def test_every_party_of_a_set_is_found_by_its_number(tmp_path: Path) -> None:
    write_set(tmp_path / "set", ["south", "north"])
    names = names_in(tmp_path / "set")
    assert names == {0: "south", 1: "north"}
    for client in (None, 0, 1):
        assert (tmp_path / "set" / folder_of(client, names) / CERTIFICATE).is_file()


def test_another_folder_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trunk/clients\.toml: No such file"):
        names_in(tmp_path)
