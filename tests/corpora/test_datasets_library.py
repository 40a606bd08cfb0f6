"""Data sets that the library `datasets` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.corpora.tables import read_table
from fedsplit.errors import SettingError
from fedsplit.settings.sections import DataSettings

ROWS = [{"text": "one, two", "owner": "ann"}, {"text": " three\n", "owner": "bob"}, {"text": "", "owner": "ann"}]
STRANGE = {"a[1]": "a1", "b::c": "c", "d[x]::*?e": "dx::ffe"}
"""Names, and others that they would match as patterns or addresses."""


def read(path: Path, **settings: str) -> dict[str, list[object]]:
    return {name: list(values) for name, values in read_table(str(path), DataSettings(**settings)).columns.items()}


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert read(tmp_path / "one")["owner"] == ["ann", "bob", "ann"]
    assert read(tmp_path / "several", split="dev") == {"text": [" three\n"], "owner": ["bob"]}
    with pytest.raises(SettingError, match="its splits are train, dev"):
        read(tmp_path / "several", split="test")


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_no_path_is_taken_for_a_pattern(tmp_path: Path, name: str, suffix: str) -> None:
    """Neither a file's nor a folder's; what a pattern would have matched, too, is not read."""
    import datasets

    folder = tmp_path / name
    (folder / "train").mkdir(parents=True)
    path, rows = folder / "train" / f"{name}.{suffix}", datasets.Dataset.from_list([{"text": "one", "owner": "ann"}])
    write = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}
    write.get(suffix, lambda plain: Path(plain).write_text("one"))(str(tmp_path / "plain"))
    (tmp_path / "plain").rename(path)
    for place in (path, folder):
        assert read(place)["text"] == ["one"]
    assert read_table(str(path), DataSettings()).name == path.stem
    path.with_name(f"{STRANGE[name]}.{suffix}").write_text("other")
    assert read(path)["text"] == ["one"]


@pytest.mark.parametrize("name", STRANGE)
def test_nor_is_that_of_what_save_to_disk_wrote(tmp_path: Path, name: str) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "plain"))
    (tmp_path / "plain").rename(tmp_path / name)
    assert read(tmp_path / name)["owner"] == ["ann", "bob", "ann"]
