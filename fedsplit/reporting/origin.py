"""The section of a report on settings, versions, commit, date and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsplit.reporting.content import Section
from fedsplit.reporting.run_record import RunRecord, numbers, shown, text
from fedsplit.reporting.text_table import Table
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, dotted


def origin(run: RunRecord) -> Section:
    """Returns the section on where a run's numbers come from."""
    section = Section("Settings and origin")
    chosen = beyond_defaults(run)
    if run.settings:
        rows = [("setting", "value")]
        rows += [(name, shown(value) or "-") for name, value in chosen.items()]
        if chosen:
            section.tables.append(Table("Settings that are not the defaults", rows))
        every = [("setting", "value")]
        every += [(name, shown(value) or "-") for name, value in run.settings.items()]
        section.folded.append(Table("All settings", every))
    rows = [("", ""), *where_from(run).items()]
    if len(rows) > 1:
        section.tables.append(Table("Origin", rows))
    parameters = run.summary.get("parameters")
    if isinstance(parameters, Mapping):
        counts = [("part", "parameters", "trained")]
        for part, of_part in parameters.items():
            found = numbers(of_part)
            counts.append((text(part), f"{found.get('total', 0):,.0f}", f"{found.get('trainable', 0):,.0f}"))
        section.tables.append(Table("Parameters", counts))
    return section


def beyond_defaults(run: RunRecord) -> dict[str, object]:
    """Returns the settings of a run that differ from the defaults, by dotted name."""
    defaults = dotted(as_document(Config()))
    return {name: value for name, value in run.settings.items() if defaults.get(name) != value}


def where_from(run: RunRecord) -> dict[str, str]:
    """Returns date, commit, machine and versions of a run, as far as its summary has them."""
    summary = run.summary
    found = {}
    if "date" in summary:
        found["date"] = text(summary["date"])
    git = summary.get("git")
    if isinstance(git, Mapping):
        changed = ", with changes that are not in it" if git.get("dirty") is True else ""
        found["commit of the working directory"] = f"{text(git.get('commit'))}{changed}"
    host = summary.get("host")
    if isinstance(host, Mapping):
        found["machine"] = f"{text(host.get('cores'))} cores, {text(host.get('system'))} {text(host.get('machine'))}"
    versions = summary.get("versions")
    if isinstance(versions, Mapping):
        found |= {text(name): text(version) for name, version in versions.items()}
    return found


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Returns the settings in which runs differ, with the value of each run.

    A setting that a run's file lacks, such as one of an earlier version, has its default.
    """
    defaults = dotted(as_document(Config()))
    names = dict.fromkeys(name for run in runs for name in run.settings)
    found = {}
    for name in names:
        values = [shown(run.settings.get(name, defaults.get(name, ""))) for run in runs]
        if len(set(values)) > 1:
            found[name] = values
    return found
