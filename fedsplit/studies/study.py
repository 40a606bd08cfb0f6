"""Study files: common settings, a grid, variants and seeds in TOML, read as a draft of settings for each run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.errors import ErrorCollector, InputError, SettingError, shortened
from fedsplit.settings.config import OPTIONS
from fedsplit.settings.documents import draft
from fedsplit.settings.drafts import Draft
from fedsplit.studies.study_file import StudyFile, flat, read_file

VARIANT = "variant"
"""Axis of the variants, beside the axes of the grid."""

FIXED = {
    "seed": "no seed here: seeds = [0, 1, 2] at the top of the file",
    "out": "no folder here: each run has a folder of its own in that of the study",
    "resume": "no folder here: a sweep goes on by itself with runs that were stopped",
}
"""Settings that a study file does not take, with what to write instead."""

ALL_SEEDS = "all seeds"
"""Name of the point of a study without a grid, whose runs differ in their seeds alone."""

MOST_RUNS = 100_000
"""Most runs of a study. A grid above that is a slip of the keyboard."""

Point = Mapping[str, Any]
"""A point of the grid: a value by axis."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        point: Value by axis, as the study file writes the value; the axis `variant` has the variant's name.
        seed: Seed of the run.
        draft: Settings of the run, with the errors in them.
    """

    point: Point
    seed: int
    draft: Draft

    @property
    def label(self) -> str:
        """Name of the point, equal for all seeds."""
        return label_of(self.point)

    @property
    def name(self) -> str:
        """Name of the run on the screen."""
        return f"{self.label}, seed {self.seed}" if self.point else f"seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study file, read.

    Attributes:
        runs: The runs: all points with the first seed, then with the second, …
        axes: Names of the axes, in the order of the file.
        columns: Settings whose values differ between runs, by dotted name.
        baseline: Values by axis that make a point the one to compare with; empty for no comparison.
        file: Content and text of the file, and of the file that it extends.
        errors: Errors in the file that are no errors of a run's settings.
    """

    runs: tuple[PlannedRun, ...]
    axes: tuple[str, ...]
    columns: tuple[str, ...]
    baseline: Point = field(default_factory=dict)
    file: StudyFile = field(default_factory=StudyFile)
    errors: tuple[InputError, ...] = ()


def label_of(point: Point) -> str:
    """Returns the name of a point of the grid.

    Example:
        >>> label_of({"strategy": "fedavg", "lora.rank": 4}), label_of({"lora.rank": [2, 4]})
        ('fedavg, lora.rank 4', 'lora.rank 2,4')
    """
    words = []
    for axis, value in point.items():
        text = text_of(value)
        words.append(text if axis in (VARIANT, "strategy") else f"{axis} {text}")
    return ", ".join(words) or ALL_SEEDS


def text_of(value: object) -> str:
    """Returns a value of a study file as one word.

    Example:
        >>> text_of([2, 4]), text_of(True), text_of("fedavg")
        ('2,4', 'true', 'fedavg')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return str(value)


def draft_of(values: Mapping[str, Any]) -> Draft:
    """Makes a draft of a configuration from flat values.

    Example:
        >>> draft_of({"strategy": "fedprox", "strategy_options.mu": 0.1}).config.strategy_options
        {'mu': 0.1}
    """
    settings = {}
    tables: dict[str, Any] = {setting: {} for setting in OPTIONS}
    by_table = {table: setting for setting, table in OPTIONS.items()}
    for name, value in values.items():
        table, _, key = name.partition(".")
        if table not in by_table:
            settings[name] = value
        elif key:
            tables[by_table[table]][key] = value
        else:  # a value that is no table, which is refused by its name
            tables[by_table[table]] = value
    return draft(settings, tables)


def read_study(path: Path, defaults: Mapping[str, Any]) -> Study:
    r"""Reads a study file.

    Args:
        path: A TOML file with `[settings]`, `[grid]`, `[[variants]]`, `seeds`, `baseline` and `extends`, each optional.
        defaults: Settings of all runs that the file does not set, by dotted name.

    Raises:
        InputError: A file cannot be read, or is no table of runs. All errors are reported together. Errors in the
            settings of runs stay in the drafts.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "study.toml"
        >>> _ = path.write_text('seeds = [0, 1]\n[grid]\nstrategy = ["fedavg", "flora"]')
        >>> [run.name for run in read_study(path, {}).runs]
        ['fedavg, seed 0', 'flora, seed 0', 'fedavg, seed 1', 'flora, seed 1']
    """
    collector = ErrorCollector()
    file = read_file(path, collector)
    parts = _parts(file.document, collector)
    # Points of a broken part would be wrong, and each would repeat its error.
    collector.check()

    points = list(_points(parts.grid, parts.variants))
    count = len(points) * len(parts.seeds)
    if count > MOST_RUNS:
        raise InputError(f"{path}: {count:,} runs are not possible; allowed: at most {MOST_RUNS:,}")
    # There is always a point: a study without axes has one that is empty.
    axes = tuple(points[0])
    of_variants = dict.fromkeys(name for values in parts.variants.values() for name in values)
    columns = dict.fromkeys([*parts.grid, *of_variants])
    baseline: Point = {}
    with collector.collecting():
        baseline = _baseline(file.document.get("baseline"), points, axes)
    common = {**defaults, **parts.common}
    runs = tuple(_runs(points, parts, common))
    return Study(runs, axes, tuple(columns), baseline, file, collector.errors)


@dataclass
class _Parts:
    """Parts of a study file, with flat values. A part with an error keeps its default."""

    common: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)


def _parts(document: Mapping[str, Any], collector: ErrorCollector) -> _Parts:
    """Reads the parts of a study file. Errors are collected."""
    parts = _Parts()
    with collector.collecting():
        parts.common = _table(document, "settings")
    with collector.collecting():
        parts.grid = _grid(document, collector)
    with collector.collecting():
        parts.variants = _variants(document, parts.grid)
    with collector.collecting():
        parts.seeds = _seeds(document.get("seeds", [0]))
    for name in parts.common.keys() & parts.grid.keys():  # a variant may change a common setting
        words = "a setting of [settings] or of [grid], not of both"
        collector.extend([SettingError(f"settings.{name}", shortened(parts.common[name]), words)])
    return parts


def _runs(
    points: Sequence[Point],
    parts: _Parts,
    common: Mapping[str, Any],
) -> Iterator[PlannedRun]:
    """Yields the runs: all points with the first seed, and so on."""
    for seed in parts.seeds:
        for point in points:
            of_grid = {name: value for name, value in point.items() if name != VARIANT}
            of_variant = parts.variants.get(point.get(VARIANT, ""), {})
            values = {**common, **of_grid, **of_variant, "seed": seed}
            yield PlannedRun(point, seed, draft_of(values))


def _table(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns a table of settings as flat values.

    Raises:
        InputError: The value is no table, or sets what a study sets by itself.
    """
    table = document.get(key, {})
    if not isinstance(table, Mapping):
        raise SettingError(key, shortened(table), "a table of settings, as in config.toml")
    values = flat(table)
    for name in FIXED.keys() & values.keys():
        raise SettingError(f"{key}.{name}", shortened(values[name]), FIXED[name])
    return values


def _grid(document: Mapping[str, Any], collector: ErrorCollector) -> dict[str, list[Any]]:
    """Returns the values of each axis.

    Args:
        document: Content of the study file.
        collector: Collects the errors of single axes.

    Raises:
        InputError: The grid is no table, or sets what a study sets by itself.
    """
    grid = _table(document, "grid")
    for axis, values in grid.items():
        with collector.collecting():
            if not isinstance(values, list) or not values:
                raise SettingError(f"grid.{axis}", shortened(values), "a list with at least one value")
            _check_different(f"grid.{axis}", values)
    return grid


def _check_different(name: str, values: Sequence[Any]) -> None:
    """Checks that the values of a list are all different.

    Raises:
        SettingError: A value occurs twice.
    """
    seen = set()
    for value in values:
        # As JSON: a set holds no lists, and would take 1 and true for equal.
        key = json.dumps(value, sort_keys=True, default=str)
        if key in seen:
            raise SettingError(name, shortened(value), "values that are all different; this one is there twice")
        seen.add(key)


def _variants(
    document: Mapping[str, Any],
    grid: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Returns the settings of each variant as flat values, by the variant's name.

    Raises:
        InputError: A variant has no name, or the name of another one, or sets what the grid or a study sets.
    """
    tables = document.get("variants", [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise SettingError("variants", shortened(tables), "tables [[variants]], each with a name and with settings")
    variants: dict[str, dict[str, Any]] = {}
    for number, table in enumerate(tables, 1):
        name = table.get("name")
        if not isinstance(name, str) or not name.strip():
            raise SettingError("variants", f"number {number} without a name", 'variants with name = "…"')
        if name in variants:
            raise SettingError("variants", f"{name} twice", "variants whose names are all different")
        own = {key: value for key, value in table.items() if key != "name"}
        # Wrapped as a table of this name, so that an error names the setting as `variants.…`.
        variants[name] = _table({"variants": own}, "variants")
        for setting in variants[name].keys() & grid.keys():
            words = "a setting of [grid] or of [[variants]], not of both"
            raise SettingError(f"variants.{setting}", shortened(variants[name][setting]), words)
    return variants


def _seeds(seeds: object) -> Sequence[int]:
    """Returns the seeds.

    Raises:
        SettingError: The value is no list of different whole numbers.
    """
    is_list = isinstance(seeds, list) and bool(seeds)
    # `type`, since `true` of TOML is an int in Python.
    if not is_list or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in seeds):  # type: ignore[attr-defined]
        shown = "an empty list" if seeds == [] else shortened(seeds)
        raise SettingError("seeds", shown, "a list of whole numbers from 0 to 4294967295, such as [0, 1, 2]")
    assert isinstance(seeds, list)
    _check_different("seeds", seeds)
    return seeds


def _points(
    grid: Mapping[str, Sequence[Any]],
    variants: Mapping[str, Any],
) -> Iterator[Point]:
    """Yields every variant with every combination of the grid's values; a single point without axes for neither."""
    axes = {VARIANT: list(variants), **grid} if variants else grid
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _baseline(given: object, points: Sequence[Point], axes: Sequence[str]) -> Point:
    """Returns the values by axis of the baseline.

    Args:
        given: A value of one axis, a table of values by axis, or None for no baseline.
        points: All points of the study.
        axes: Names of the axes.

    Raises:
        SettingError: No point has the values, or several axes have the value.
    """
    if given is None:
        return {}
    values = {}
    for axis in axes:
        # A dictionary, since a set would not keep the order of the study.
        values[axis] = list({text_of(point[axis]): None for point in points})
    if isinstance(given, Mapping):
        wanted = flat(given)
    else:
        found = [axis for axis in axes if text_of(given) in values[axis]]
        if len(found) > 1:
            allowed = (
                f"a table, such as {{ {_quoted(found[0])} = {_toml(given)} }}: {' and '.join(found)} have the value"
            )
            raise SettingError("baseline", shortened(given), allowed)
        wanted = dict.fromkeys(found, given)
    is_known = all(axis in axes and text_of(value) in values[axis] for axis, value in wanted.items())
    if not wanted or not is_known:
        listed = "; ".join(f"{axis}: {', '.join(values[axis])}" for axis in axes) or "none, since the study has no grid"
        raise SettingError("baseline", shortened(given), f"values of the study ({listed})")
    return wanted


def _quoted(axis: str) -> str:
    """Returns an axis as a key of a TOML table."""
    return f'"{axis}"' if "." in axis else axis


def _toml(value: object) -> str:
    """Returns a plain value as TOML writes it."""
    return json.dumps(value, default=str)
