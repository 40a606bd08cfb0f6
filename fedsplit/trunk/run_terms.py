"""Terms on which a run and a trunk in a process of its own agree, and the messages that begin and end a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_MOST_SHOWN = 40


@dataclass(frozen=True)
class Terms:
    """Everything that the numbers of a trunk depend on, as one side knows it.

    Attributes:
        settings: Values of settings as JSON, by dotted name.
        model: Digests of the base model's files, by name.
        code: Digests of further files, by setting: the user's strategy and the initial adapter.
        version: Version of fedsplit.
    """

    settings: Mapping[str, str]
    model: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    def differences(self, offered: Terms) -> tuple[str, ...]:
        """Returns what differs from the terms of the other side, in words; nothing if both agree.

        Args:
            offered: Terms of the run, which the trunk is asked to serve.

        Example:
            >>> Terms({"seed": "0", "cut": '"1:5"'}).differences(Terms({"seed": "1", "cut": '"1:5"'}))
            ('seed (0 at the trunk, 1 in the run)',)
        """
        found = []
        for name in sorted({*self.settings, *offered.settings}):
            here = self.settings.get(name, "nothing")
            there = offered.settings.get(name, "nothing")
            if here != there:
                found.append(f"{name} ({_shown(here)} at the trunk, {_shown(there)} in the run)")
        # A party may have fetched only the files with the weights of its own blocks.
        common = sorted(self.model.keys() & offered.model.keys())
        if not common and (self.model or offered.model):
            found.append("model (no file of the same name)")
        found += [f"model ({name})" for name in common if self.model[name] != offered.model[name]]
        names_of_code = sorted({*self.code, *offered.code})
        for name in names_of_code:
            if self.code.get(name) != offered.code.get(name):
                found.append(f"{name} (its files)")
        if self.version != offered.version:
            found.append(f"fedsplit ({self.version} at the trunk, {offered.version} in the run)")
        return tuple(found)


@dataclass(frozen=True)
class BeginRun:
    """Asks a trunk in a process of its own to begin a run. The trunk serves one run at a time.

    Attributes:
        terms: Terms of the run.
        owner: Identity of the run for its operator, which stays the same if the run begins again or is resumed. Empty
            for none.
    """

    terms: Terms
    owner: str = ""


@dataclass(frozen=True)
class FinishRun:
    """Tells a trunk in a process of its own that a run is over, so that another one can begin."""


@dataclass(frozen=True)
class Begun:
    """Reply to `BeginRun`.

    Attributes:
        run: Name of the new run; empty if no run has begun.
        incarnation: Identity of the new start of the trunk; empty if no run has begun.
        differences: Differences of the terms, in words.
        is_busy: True if the trunk serves a run of somebody else.
    """

    run: str = ""
    incarnation: str = ""
    differences: tuple[str, ...] = ()
    is_busy: bool = False


def _shown(value: str) -> str:
    return value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}…"
