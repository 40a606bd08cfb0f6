"""Content of a report: sections of figures and tables, before they become a page."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsplit.reporting.text_table import Table


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    Attributes:
        title: Words above the figure.
        svg: The figure, as `fedsplit.reporting.figures` draws it.
        caption: Explains what is drawn, and how to read it.
        is_wide: True for a figure that needs the page's whole width.
    """

    title: str
    svg: str
    caption: str = ""
    is_wide: bool = False


@dataclass(frozen=True)
class Passage:
    """A text of a model, or a table to be copied.

    Attributes:
        title: Words above the text.
        text: The text, whose lines are kept.
    """

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: Its heading.
        intro: A sentence below the heading; empty for none.
        pictures: Its figures.
        tables: Its tables, below the figures.
        folded: Tables that the reader opens.
        passages: Texts.
        copies: Texts to be copied, which the reader opens.
    """

    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    copies: list[Passage] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to show."""
        # An introduction alone shows nothing, and neither does a copy of a table that is not there.
        return not (self.pictures or self.tables or self.folded or self.passages)


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Title of the page.
        subtitle: A line below the title.
        figures: The few numbers that the page begins with: words and values.
        notes: What is missing, a line each.
        sections: The sections; empty ones are left out.
    """

    title: str
    subtitle: str
    figures: list[tuple[str, str]]
    notes: list[str]
    sections: list[Section]
