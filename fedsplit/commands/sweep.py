"""`fedsplit sweep`: all runs of a study file, through warm processes, as one table and one comparison."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import ENDED_EARLY, exit_code, words_of
from fedsplit.environment import prepare
from fedsplit.errors import ErrorCollector, InputError
from fedsplit.settings.command_line import Parser
from fedsplit.settings.config import Config
from fedsplit.shutdown import advised, stoppable
from fedsplit.studies.study import PlannedRun, Study, read_study
from fedsplit.studies.warm_pool import Job, Outcome, Workers

if TYPE_CHECKING:
    from fedsplit.corpora.sharding import Partition
    from fedsplit.studies.comparison_table import FailedRun, Line
    from fedsplit.studies.table import FinishedRun

DEFAULTS = {"engine": "local", "threads": 1, "trunk.threads": 1, "report": False}
"""Settings of all runs that the study does not set.

With one thread a run, no number depends on how many runs the machine plays at once. The study has one report.
"""

SPARE = 1.25
"""Free memory for one more process, as a multiple of the largest peak memory of a run so far."""


class OnePartition:
    """Reads the data of a run, and keeps them until a run with other data comes.

    Runs that differ in their strategy alone have the same data.
    """

    def __init__(self) -> None:
        """Keeps nothing yet."""
        self._key: object = None
        self._partition: Partition | None = None

    def __call__(self, config: Config) -> Partition:
        """Returns the data of a run, divided among the clients."""
        from fedsplit.corpora.partition import partition_of

        # All that decides about the sequences of a run; the model, since its tokenizer cuts the texts.
        key = (
            *(config.model, config.dataset, config.partition, config.clients, config.seed),
            *(config.train.max_length, config.data),
        )
        if self._partition is None or key != self._key:
            self._partition = partition_of(config)
            # Only now: reading may fail, and the key must not name data that are not there.
            self._key = key
        return self._partition


_read_data = OnePartition()
"""Data of the last run of this process."""


def warm() -> None:
    """Imports what every run needs."""
    prepare()
    warnings.simplefilter("ignore")
    # For their own sake: the modules stay loaded for all runs of the process.
    import fedsplit.engines.in_process
    import fedsplit.results.merging  # noqa: F401


def play(config: Config) -> dict[str, Any]:
    """Plays a run in a worker process, and returns the summary."""
    from fedsplit.commands import simulate
    from fedsplit.trunk.memory import forget_peak_memory, return_free_pages

    # Memory of the run before must not count for this run's peak.
    gc.collect()
    return_free_pages()
    forget_peak_memory()
    with stoppable():
        return simulate.run(config, read=_read_data)


@dataclass
class Progress:
    """How far a sweep is.

    Attributes:
        of: Number of runs to play.
        started: Time of the start, on the clock `time.monotonic`.
        done: Number of runs that have ended.
        peak: Largest peak memory of a run so far, in bytes; 0 before the first.
    """

    of: int
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    peak: int = 0

    def learn(self, summary: dict[str, Any]) -> None:
        """Learns from a run's summary how much memory a run needs."""
        memory = summary["peak_memory"]
        self.peak = max(self.peak, memory["client"], memory["trunk"])  # on the engine local both name one process

    def may_grow(self) -> bool:
        """Returns True if the measured memory of a run is free once more."""
        from fedsplit.trunk.memory import free_memory

        return self.peak > 0 and free_memory() >= SPARE * self.peak

    @property
    def left(self) -> str:
        """Time left in words, by the runs so far."""
        seconds_a_run = (time.monotonic() - self.started) / self.done
        seconds = seconds_a_run * (self.of - self.done)
        if self.done == self.of:
            return f"{self.done} of {self.of}"
        return f"{self.done} of {self.of}, about {_clock(seconds)} left"


def _clock(seconds: float) -> str:
    """Returns a duration in minutes and seconds.

    Example:
        >>> _clock(72.4), _clock(3700)
        ('1:13', '1:01:40')
    """
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@dataclass(frozen=True)
class Checked:
    """A run of a study whose settings have passed all checks.

    Attributes:
        run: The run.
        config: Settings to begin or to go on with.
        folder: Folder of the run.
        result: Result of an earlier sweep; None for a run that is to be played.
    """

    run: PlannedRun
    config: Config
    folder: Path
    result: FinishedRun | None


def check(
    study: Study,
    out: Path,
    begin: Callable[[], object] = lambda: None,
) -> list[Checked]:
    """Checks all runs of a study. The data are read, and no file is written.

    Args:
        study: The study.
        out: Folder of the study.
        begin: Called before each check that takes long, of a run that is to be played.

    Raises:
        InputError: A run has wrong settings. The errors of all runs are reported together.
    """
    from fedsplit.commands import run_checks
    from fedsplit.studies.folder import RUNS, digest_of, finished, name_of_run, settings_for

    checked: list[Checked] = []
    by_error: dict[str, list[str]] = {}
    by_digest: dict[str, str] = {}
    for run in study.runs:
        try:
            config = run_checks.checked(run.draft)
            twin = by_digest.setdefault(digest_of(config), run.name)
            if twin != run.name:
                raise InputError(f"its settings are those of the run {twin}; allowed: runs that are all different")
            folder = out / RUNS / name_of_run(run.label, run.seed, config)
            result = finished(folder, run.label, run.seed)
            if result is None:
                config = settings_for(folder, config)
                begin()
                with contextlib.redirect_stdout(_Once()):
                    run_checks.check(config, read=_read_data)
            checked.append(Checked(run, config, folder, result))
        except InputError as error:
            # By error, since many runs share a wrong setting: each error is shown once, with the runs that have it.
            for each in error.errors:
                by_error.setdefault(str(each), []).append(run.name)
    collector = ErrorCollector()
    collector.extend(study.errors)
    for words, names in by_error.items():
        where = "" if len(names) == len(study.runs) else f" (in {_listed(names)})"
        collector.extend([InputError(words + where)])
    collector.check()
    return checked


def _listed(names: Sequence[str]) -> str:
    """Returns the names of some runs in words.

    Example:
        >>> _listed(["a", "b"]), _listed(["a", "b", "c", "d"])
        ('a and b', 'a and 3 other runs')
    """
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} other runs"


class _Once(io.StringIO):
    """Prints lines as they come, and each line once: all runs of a study report the same on their model."""

    shown: set[str] = set()  # noqa: RUF012  # of all objects

    def write(self, text: str) -> int:
        """Prints the lines of a text that were not printed before."""
        for line in text.splitlines():
            if line.strip() and line not in self.shown:
                self.shown.add(line)
                # `sys.stdout` is this very object while it is redirected.
                print(line, file=sys.__stdout__, flush=True)
        return len(text)


def sweep(path: Path, out: Path, jobs: int, only_check: bool = False) -> int:
    """Plays the runs of a study that have no result yet, and writes the table and the comparison.

    Args:
        path: The study file.
        out: Folder of the study.
        jobs: Number of runs at once; 0 for as many as there are cores and memory for.
        only_check: True to check the runs and to show them, and to play none.

    Returns:
        0 if all runs are complete, 1 if a run failed, `ENDED_EARLY` if a run has a result without its last rounds.

    Raises:
        InputError: The study or a setting is wrong. Nothing has been written.
    """
    study = read_study(path, DEFAULTS)
    progress = Progress(len(study.runs))
    with Workers(play, warm, words_of, jobs or _cores(study), progress.may_grow) as workers:
        if jobs:
            # The user's number of runs stands, whatever memory is free.
            workers.may_grow = lambda: True
        prepare()
        warnings.simplefilter("ignore")
        # The imports of the first process go on beside the checks. Nothing is started if all runs are finished.
        checked = check(study, out, lambda: None if only_check else workers.start_first())
        if only_check:
            _show(checked)
            return 0
        from fedsplit.studies.folder import occupied

        with occupied(out), advised(lambda: _advice(path, out, progress, checked)):
            _copy_files(study, out)
            return _play_all(study, checked, out, workers, progress)


def _copy_files(study: Study, out: Path) -> None:
    """Writes copies of the study file and of the file that it extends, so that the copies can be played."""
    from fedsplit.durable import write_text

    for name, text in study.file.texts.items():
        write_text(out / name, text)


def _cores(study: Study) -> int:
    """Returns the number of runs at once that the cores suffice for: one where a run starts processes of its own."""
    from fedsplit.environment import available_cores

    configs = [run.draft.config for run in study.runs if not run.draft.errors]
    if any(config.engine != "local" for config in configs):
        return 1
    threads = max([config.threads or 1 for config in configs], default=1)
    return max(1, available_cores() // threads)


def _show(checked: Sequence[Checked]) -> None:
    """Prints the runs of a study."""
    for each in checked:
        state = "finished" if each.result else ("goes on" if each.config.resume else "to be played")
        print(f"{each.run.name}: {state}  {each.folder}")


def _advice(path: Path, out: Path, progress: Progress, checked: Sequence[Checked]) -> str:
    """Returns what the user can do after the sweep was stopped."""
    before = sum(each.result is not None for each in checked)
    return f"{before + progress.done} of {len(checked)} runs have ended; fedsplit sweep {path} --out {out} goes on"


def _play_all(
    study: Study,
    checked: Sequence[Checked],
    out: Path,
    workers: Workers,
    progress: Progress,
) -> int:
    """Plays the runs without a result, and writes what has come out."""
    from fedsplit.studies.comparison_table import FailedRun
    from fedsplit.studies.folder import LOGS, opened

    by_name = {each.folder.name: each for each in checked}
    results = {name: each.result for name, each in by_name.items() if each.result is not None}
    # Finished runs tell how much memory a run needs, before the first of the new ones has ended.
    for result in results.values():
        progress.learn(dict(result.summary))
    todo = [each for each in checked if each.result is None]
    # The time left is that of the runs that are played now.
    progress.of = len(todo)
    progress.started = time.monotonic()
    _say_start(checked, todo, out)

    failed: dict[str, FailedRun] = {}
    early: list[str] = []
    jobs = [Job(each.folder.name, each.config, out / LOGS / f"{each.folder.name}.log") for each in todo]
    for outcome in workers.play(jobs):
        each = by_name[outcome.name]
        progress.done += 1
        if outcome.error:
            reason = " ".join(outcome.error.split())
            failed[each.run.name] = FailedRun(each.run.label, each.run.seed, reason)
        else:
            progress.learn(outcome.value)
            results[outcome.name] = opened(each.folder, each.run.label, each.run.seed)
            if not outcome.value["complete"]:
                early.append(each.run.name)
        print(_line(each.run.name, outcome, progress), flush=True)
    # In the order of the study, and not in that in which the runs have ended.
    in_order = [results[name] for name in by_name if name in results]
    _write_results(study, in_order, list(failed.values()), out)
    for name, run in failed.items():
        print(f"fedsplit: {name} failed: {run.reason}", file=sys.stderr)
    for name in early:
        print(f"fedsplit: {name} ended early", file=sys.stderr)
    return 1 if failed else (ENDED_EARLY if early else 0)


def _say_start(checked: Sequence[Checked], todo: Sequence[Checked], out: Path) -> None:
    """Prints how many runs there are, and how many of them are played."""
    done = len(checked) - len(todo)
    going_on = sum(bool(each.config.resume) for each in todo)
    words = f"{len(checked)} runs in {out}"
    if done:
        words += f", {done} of them finished before"
    if going_on:
        words += f", {going_on} of them stopped before and going on"
    print(words, flush=True)


def _line(name: str, outcome: Outcome, progress: Progress) -> str:
    """Returns the line of a run that has ended."""
    if outcome.error:
        return f"{name}  failed: {outcome.error}  {progress.left}"
    loss = outcome.value["eval_loss"]
    losses = f"held-out loss {loss['before']:.4f} -> {loss['after']:.4f}"
    return f"{name}  {losses}  {outcome.value['wall_seconds']:.1f} s  {progress.left}"


def _write_results(
    study: Study,
    results: Sequence[FinishedRun],
    failed: Sequence[FailedRun],
    out: Path,
) -> None:
    """Writes the comparison of all runs and the table of those with a result, and prints the comparison of losses."""
    from fedsplit.durable import write_text
    from fedsplit.studies.comparison_table import as_json, comparison, markdown, origin_of
    from fedsplit.studies.table import tidy, write_table

    points = {run.label: run.point for run in study.runs}
    lines = comparison(results, points, study.baseline)
    document = as_json(lines, study.file.document, origin_of(results), failed)
    files = [out / "comparison.md", out / "comparison.json"]
    for file, text in zip(files, (markdown(lines, failed), document), strict=True):
        write_text(file, text)
    if results:
        files += write_table(tidy(results, study.columns, points), out / "table")
        files += _write_report(results, out)
    print(*_screen(lines), sep="\n")
    print("files ", *files)


def _write_report(results: Sequence[FinishedRun], out: Path) -> list[Path]:
    """Writes one report on all runs; says why if it cannot be drawn, since the results are written already."""
    from fedsplit.reporting.page import REPORT, write_report

    try:
        return [write_report([result.folder for result in results], out / REPORT, title=out.name)]
    except (InputError, OSError, ImportError) as error:
        print(f"fedsplit: no report: {words_of(error)}", file=sys.stderr)
        return []


def _screen(lines: Sequence[Line]) -> Iterator[str]:
    """Yields the lines of a comparison for the screen: of the first measure, the held-out loss."""
    from fedsplit.formatting import aligned
    from fedsplit.studies.comparison_table import remark, tables

    for rows in itertools.islice(tables(lines), 1):
        yield from aligned(rows)
    if words := remark(lines):
        yield words


def make_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="fedsplit sweep",
        description="Plays all runs of a study file, and compares them. Runs that are finished are not played again.",
    )
    parser.add_argument("study", metavar="STUDY", help="a TOML file with [settings], [grid], seeds and baseline")
    parser.add_argument("--out", metavar="DIR", help="folder of the study (default: runs/NAME of the file)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="runs at once (default: as many as there are cores, and memory by the measured peak of the runs so far)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all runs and list them, and play none")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> int:
        flags = make_parser().read(argv).checked()
        if flags.jobs < 0:
            raise InputError(f"--jobs {flags.jobs} is not possible; allowed: a whole number of at least 0")
        path = Path(flags.study)
        out = Path(flags.out) if flags.out else Path("runs", path.stem)
        return sweep(path, out, flags.jobs, flags.dry_run)

    return exit_code(work, argv)
