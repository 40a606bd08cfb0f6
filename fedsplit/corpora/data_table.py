"""A data set as a table: columns by name, with the class names of columns that hold class numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedsplit.corpora.datasets_library import class_names
from fedsplit.corpora.files import Columns
from fedsplit.errors import SettingError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Table:
    """A data set, column by column.

    Attributes:
        dataset: Name of the data set in the settings.
        name: Name of the owner, for a table without a column of owners.
        columns: Values of each column.
        classes: Class names of columns that hold class numbers.
        doubled: Names that two columns share. A setting cannot name such a column.

    Example:
        >>> table = Table("notes.csv", "notes", {"text": ["a", "b"], "owner": ["ann", "bob"]})
        >>> len(table), table.column("data.owner", "owner")
        (2, ['ann', 'bob'])
    """

    dataset: str
    name: str
    columns: Mapping[str, Sequence[Any]]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    doubled: Collection[str] = ()

    def __len__(self) -> int:
        return count_rows(self.columns)

    @property
    def listed(self) -> str:
        """Names of the columns, for messages."""
        return ", ".join(self.columns)

    def column(self, setting: str, name: str) -> Sequence[Any]:
        """Returns the values of a column.

        Args:
            setting: Setting that names the column, for the message.
            name: Name of the column.

        Raises:
            SettingError: No column has the name, or two columns have it.
        """
        if name not in self.columns:
            raise SettingError(setting, name, f"a column of {self.dataset}: {self.listed}")
        if name in self.doubled:
            raise SettingError(setting, name, f"a column whose name no other column of {self.dataset} has")
        return self.columns[name]

    def of_first(self, count: int, column: str) -> Table:
        """Returns the rows with one of the first values of a column, in order of first appearance.

        Args:
            count: Number of different values.
            column: Name of the column.

        Example:
            >>> table = Table("notes.csv", "notes", {"text": ["a", "b", "c"], "owner": ["ann", "bob", "ann"]})
            >>> table.of_first(1, "owner").columns["text"]
            ['a', 'c']
        """
        values = self.columns[column]
        in_order = list(dict.fromkeys(values))
        wanted = set(in_order[:count])
        rows = [row for row, value in enumerate(values) if value in wanted]
        columns = {}
        for name, cells in self.columns.items():
            columns[name] = [cells[row] for row in rows]
        return replace(self, columns=columns)


def as_table(dataset: str, name: str, rows: Dataset) -> Table:
    """Returns a `datasets.Dataset` as a table."""
    # `[:]` makes a list: a column of `datasets` is read from disk at every access.
    columns = {column: rows[column][:] for column in rows.column_names}
    return Table(dataset, name, columns, class_names(rows.features))


def count_rows(columns: Columns) -> int:
    """Returns the number of rows."""
    first = next(iter(columns.values()), ())
    return len(first)
