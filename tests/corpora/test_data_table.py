"""Tables: columns by name."""

from __future__ import annotations

import datasets
import pytest

from fedsplit.corpora.data_table import Table, as_table, count_rows
from fedsplit.errors import SettingError

TABLE = Table("notes.csv", "notes", {"text": ["a", "b", "c"], "owner": ["ann", "bob", "ann"]}, doubled=["owner"])


def test_a_column_is_named_by_a_setting() -> None:
    assert len(TABLE) == 3 and TABLE.column("data.text", "text") == ["a", "b", "c"]
    with pytest.raises(SettingError) as refused:
        TABLE.column("data.text", "note")
    assert str(refused.value) == "data.text: note is not possible; allowed: a column of notes.csv: text, owner"
    with pytest.raises(SettingError, match=r"allowed: a column whose name no other column of notes\.csv has"):
        TABLE.column("data.owner", "owner")


@pytest.mark.parametrize(("count", "texts"), [(0, []), (1, ["a", "c"]), (2, ["a", "b", "c"]), (9, ["a", "b", "c"])])
def test_rows_of_the_first_owners_keep_their_order(count: int, texts: list[str]) -> None:
    assert TABLE.of_first(count, "owner").columns["text"] == texts


def test_class_names_come_from_the_library() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    table = as_table("votes", "votes", rows)
    assert table.columns == {"text": ["a", "b"], "label": [1, 0]} and table.classes == {"label": ["no", "yes"]}


def test_a_table_without_columns_has_no_rows() -> None:
    assert count_rows({}) == 0
