"""Parser of chains of codecs, such as `topk:0.1,int8,zstd`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from fedsplit.errors import shortened
from fedsplit.settings.choices import CODECS, EXACT_IN_EVALUATION, CodecEntry

_ORDER = ("before", "last", "bytes")


def _form_of(name: str, entry: CodecEntry) -> str:
    """Returns a codec's name with the form of its parameter, such as "zstd[:LEVEL]"."""
    if entry.parameter is None:
        return name
    return f"{name}[:{entry.word}]" if entry.default is not None else f"{name}:{entry.word}"


def _forms_at(place: str) -> str:
    """Returns the forms of all codecs with a place in a chain."""
    return " | ".join(_form_of(name, entry) for name, entry in CODECS.items() if entry.place == place)


def chain_forms() -> str:
    """Returns the forms of a chain in words, for messages and help texts."""
    before, last, of_bytes = map(_forms_at, _ORDER)
    leading = f"any of {before}, then " if before else ""
    ending = f", then {of_bytes}; each may be left out" if of_bytes else ""
    return f"codecs separated by commas: {leading}one of {last}{ending}"


@dataclass(frozen=True)
class ChainLink:
    """One codec of a chain.

    Attributes:
        name: Name of the codec.
        parameter: Number behind the colon, or the codec's default; None for a codec without a parameter.
        remembers: True if the codec keeps state from step to step.
    """

    name: str
    parameter: float | None = None
    remembers: bool = False

    @property
    def entry(self) -> CodecEntry:
        """Entry of the codec in the table of codecs."""
        return CODECS[self.name]


def parts_of(text: str) -> list[str]:
    """Returns the codecs of a chain as they are written, without the spaces around them.

    Example:
        >>> parts_of("mxfp4 , zstd:9")
        ['mxfp4', 'zstd:9']
    """
    return [part.strip() for part in text.split(",")]


def chain_problem(text: str) -> str:
    """Returns the words about what is possible in place of a text that is no chain.

    A codec with a wrong parameter is named. Any other mistake brings the forms of all chains.

    Example:
        >>> chain_problem("topk:2,int8")
        'in place of topk:2, topk:SHARE with a SHARE from 0.0001 to 1'
        >>> chain_problem("int4:3")
        'in place of int4:3, int4, which takes no parameter'
    """
    for part in parts_of(text):
        name = part.partition(":")[0]
        entry = CODECS.get(name)
        if entry is not None and _parse_link(part, has_memory_before=False) is None:
            return f"in place of {shortened(part)}, {_form_of(name, entry)}{_range_of(entry)}"
    return chain_forms()


def _range_of(entry: CodecEntry) -> str:
    """Returns the words about the parameter of a codec, as they follow the form of the codec."""
    if entry.parameter is None:
        return ", which takes no parameter"
    low, high = entry.parameter
    kind = f"a whole {entry.word}" if entry.is_whole else f"a {entry.word}"
    return f" with {kind} from {low:g} to {high:g}"


def parse_chain(text: str) -> tuple[ChainLink, ...] | None:
    """Parses a chain of codecs.

    Returns:
        The codecs in the order of encoding; None if the text is no chain. Spaces around a codec do not count.

    Example:
        >>> [link.name for link in parse_chain("raw")], parse_chain("raw,bf16"), parse_chain("raw:2"), parse_chain("")
        (['raw'], None, None, None)
    """
    links: list[ChainLink] = []
    for item in parts_of(text):
        link = _parse_link(item, has_memory_before=any(earlier.remembers for earlier in links))
        if link is None:
            return None
        links.append(link)
    return tuple(links) if _is_in_order(links) else None


def measures_exactly(text: str) -> bool:
    """Returns True if held-out text crosses a chain of codecs without any loss.

    Example:
        >>> measures_exactly("raw,zstd"), measures_exactly("delta:0.1"), measures_exactly("topk:0.1")
        (True, True, False)
    """
    return all(link.name in EXACT_IN_EVALUATION for link in parse_chain(text) or ())


def _parse_link(text: str, has_memory_before: bool) -> ChainLink | None:
    """Parses one codec with its parameter.

    Args:
        text: Name, or name and parameter.
        has_memory_before: True if an earlier codec of the chain keeps state.
    """
    name, colon, number = text.partition(":")
    entry = CODECS.get(name)
    if entry is None or (colon and entry.parameter is None):
        return None
    # The first memory already knows how far the decoded values are from the true ones. A second one would count the
    # same error twice.
    remembers = entry.remembers and not has_memory_before
    if entry.parameter is None:
        return ChainLink(name, remembers=remembers)
    parameter = _parse_parameter(number, entry) if colon else entry.default
    return None if parameter is None else ChainLink(name, parameter, remembers)


def _parse_parameter(text: str, entry: CodecEntry) -> float | None:
    """Parses the parameter of a codec; returns None if the value is not possible."""
    assert entry.parameter is not None
    low, high = entry.parameter
    try:
        value = float(text)
    except ValueError:
        return None
    if not low <= value <= high or (entry.is_whole and value != int(value)):  # NaN fails the comparison, too
        return None
    return value


def _is_in_order(links: list[ChainLink]) -> bool:
    """Returns True if each codec can work on what the codec before leaves."""
    names = [link.name for link in links]
    places = [_ORDER.index(link.entry.place) for link in links]
    pairs = itertools.pairwise(places)
    # Several codecs may leave values to the next one. Of the other places, a chain has at most one codec each.
    rises = all(earlier < later or earlier == later == 0 for earlier, later in pairs)
    # Delta coding predicts tensors as they are, and not what another codec has left of them.
    return rises and len(set(names)) == len(names) and "delta" not in names[1:]
