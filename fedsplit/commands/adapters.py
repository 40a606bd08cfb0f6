"""`python -m fedsplit.adapters`: counts, merges, combines, exports and compares the adapters of finished runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedsplit.commands.adapter_tables import MODEL_MISSING, compare, summary
from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.results.finished import (
    ADAPTER_FILES,
    Adapter,
    as_tasks,
    check_same_base,
    copy_adapter,
    find_adapter,
    open_run,
)
from fedsplit.settings.choices import DTYPES
from fedsplit.settings.command_line import Call, Parser

COMBINATIONS = ("cat", "svd", "linear")
"""Ways to combine adapters, by their names in PEFT."""


def _collector(call: Call) -> ErrorCollector:
    """Returns a collector with the errors of a command line. The checks of the command add to the errors."""
    collector = ErrorCollector()
    collector.extend(call.errors)
    return collector


def _summary(call: Call) -> list[str]:
    """Returns the tables of a run's parameters and files."""
    collector = _collector(call)
    with collector.collecting():
        run = open_run(call.flags.run)
    collector.check()
    return summary(run)


def _compare(call: Call) -> list[str]:
    """Returns the tables that compare two runs."""
    collector = _collector(call)
    with collector.collecting():
        first = open_run(call.flags.first)
    with collector.collecting():
        second = open_run(call.flags.second)
    collector.check()
    return compare(first, second)


def _merge(call: Call) -> list[str]:
    """Writes a merged model, and returns the line to show."""
    flags = call.flags
    collector = _collector(call)
    with collector.collecting():
        adapter = find_adapter(flags.run, flags.client)
        is_run = adapter.folder != flags.run  # a folder of PEFT's is the adapter itself
        # With personal adapters, the shared adapter is no client's: the user has to say which one to merge.
        if is_run and flags.client is None:
            open_run(flags.run).check_shared()
        adapter = _with_base(adapter, flags.model)
    with collector.collecting():
        _check_out(flags.out)
    collector.check()

    # Not at the top: torch takes seconds to load, and a wrong call is to fail at once.
    from fedsplit.events.screen import busy
    from fedsplit.results.merging import merge

    with busy("adding the adapter to the weights"):
        classes = merge(adapter, flags.out, flags.dtype)
    decoded = f", decoded from {adapter.quantization} bits" if adapter.quantization else ""
    merged = f"{flags.out}: {adapter.model} with {adapter.folder} added to its weights"
    return [f"{merged}{decoded}, in {flags.dtype}{_classifier_note(classes)}"]


def _classifier_note(classes: int) -> str:
    """Returns words on how to open a classifier, or "" for a causal LM, which has no classes."""
    if not classes:
        return ""
    return f"; AutoModelForSequenceClassification opens it, with {classes} classes"


def _with_base(adapter: Adapter, model: str) -> Adapter:
    """Returns the adapter with the folder of its base model replaced by `--model`, if given."""
    return replace(adapter, model=model) if model else adapter


def _unmerge(call: Call) -> list[str]:
    """Writes the base model of a merged model, and returns the line to show."""
    flags = call.flags
    collector = _collector(call)
    with collector.collecting():
        if not flags.model.is_dir():
            raise InputError(f"{flags.model} is no merged model: there is no such folder")
    with collector.collecting():
        _check_out(flags.out)
    collector.check()
    from fedsplit.events.screen import busy
    from fedsplit.results.merging import unmerge

    with busy("taking the adapter off the weights"):
        dtype = unmerge(flags.model, flags.out)
    return [f"{flags.out}: the base without what was merged, in {dtype}"]


def _combine(call: Call) -> list[str]:
    """Writes the weighted sum of adapters, and returns the line to show."""
    flags = call.flags
    collector = _collector(call)
    with collector.collecting():
        if len(flags.runs) < 2:
            raise InputError("combine: one adapter is not possible; allowed: two or more")
    with collector.collecting():
        weights = _weights(flags.weights, len(flags.runs))
    with collector.collecting():
        if flags.rank is not None and (flags.how != "svd" or flags.rank < 1):
            raise SettingError("rank", flags.rank, "a whole number of at least 1, with --how svd")
    adapters = []
    for folder in vars(flags)["runs"] or ():  # `vars`: reading a refused flag would raise an error
        with collector.collecting():
            adapters.append(_with_base(find_adapter(folder), flags.model))
    with collector.collecting():
        _check_out(flags.out)
    collector.check()
    check_same_base(adapters)  # compares the files of weights, which takes a while

    from fedsplit.events.screen import busy
    from fedsplit.results.combining import combine

    with busy("combining the adapters"):
        rank = combine(adapters, weights, flags.how, flags.out, flags.rank)
    terms = " + ".join(f"{weight:g} * {adapter.name}" for weight, adapter in zip(weights, adapters, strict=True))
    return [f"{flags.out}: {terms} by {flags.how}, of rank {rank}"]


def _export(call: Call) -> list[str]:
    """Writes a folder of adapters for PEFT, and returns the Python lines that open the adapters."""
    flags = call.flags
    adapters = []
    collector = _collector(call)
    for folder in vars(flags)["runs"] or ():
        with collector.collecting():
            adapters += _adapters_in(folder)
    is_complete = not collector.errors  # else names would be counted against the wrong number of adapters
    with collector.collecting():
        if is_complete:
            check_same_base(adapters)
            names = flags.names.split(",") if flags.names else ()
            tasks = as_tasks(adapters, names)
    with collector.collecting():
        _check_out(flags.out)
    collector.check()

    from fedsplit.durable import write_folder
    from fedsplit.results.fitting import read_known
    from fedsplit.results.whole import check_same_head

    tensors = {}
    models_are_here = True
    # All files are read before anything is written: a broken one must leave no folder behind.
    for adapter in adapters:
        tensors[adapter.folder], is_here = read_known(adapter)
        models_are_here = models_are_here and is_here
    classes = check_same_head(tensors)

    def fill(draft: Path) -> None:
        for name, adapter in tasks.items():
            copy_adapter(adapter, draft / name)

    write_folder(flags.out, fill)
    head = f"{flags.out}: {', '.join(tasks)}, of {adapters[0].model}{_classifier_note(classes)}"
    lines = [head, *_opening_lines(flags.out, list(tasks))]
    if not models_are_here:
        lines.append(f"# {MODEL_MISSING}")
    return lines


def _push(call: Call) -> list[str]:
    """Uploads an adapter to the Hub, and returns the line to show."""
    flags = call.flags
    collector = _collector(call)
    with collector.collecting():
        adapter = find_adapter(flags.run, flags.client)
        if adapter.folder != flags.run and flags.client is None:
            open_run(flags.run).check_shared()
        adapter = _with_base(adapter, flags.model)
    collector.check()

    from fedsplit.results.publishing import check_access, push

    # Before the upload, so that a token without access fails at once.
    check_access(flags.repository)
    address = push(adapter, flags.repository, private=not flags.public, with_base=flags.export_base)
    return [f"{adapter.folder} is on the Hub: {address}"]


def _adapters_in(folder: Path) -> list[Adapter]:
    """Returns the adapter in a folder, followed by the personal adapters if the folder belongs to a run.

    Raises:
        InputError: The folder holds no adapter and no finished run.
    """
    adapters = [find_adapter(folder)]
    is_run = not (folder / ADAPTER_FILES[0]).is_file()
    if is_run:
        run = open_run(folder)
        adapters += [run.adapter(client) for client in run.personal]
    return adapters


def _opening_lines(folder: Path, names: Sequence[str]) -> list[str]:
    """Returns the Python lines that open exported adapters by PEFT and choose the last adapter.

    Args:
        folder: The written folder.
        names: Names of the adapters.

    Example:
        >>> for line in _opening_lines(Path("out"), ["ann", "bob"]):
        ...     print(line)
        model = PeftModel.from_pretrained(base, "out/ann", adapter_name="ann")
        model.load_adapter("out/bob", adapter_name="bob")
        model.set_adapter("bob")
    """
    first, *others = names
    lines = [f'model = PeftModel.from_pretrained(base, "{folder}/{first}", adapter_name="{first}")']
    for name in others:
        lines.append(f'model.load_adapter("{folder}/{name}", adapter_name="{name}")')
    lines.append(f'model.set_adapter("{names[-1]}")')
    return lines


def _weights(text: str, count: int) -> list[float]:
    """Returns the weights in `--weights`, or equal weights with the sum 1 for an empty text.

    Args:
        text: Weights, separated by commas.
        count: Number of adapters.

    Raises:
        SettingError: The text holds a word that is no finite number, or a wrong number of weights.

    Example:
        >>> _weights("0.25,0.75", count=2), _weights("", count=2)
        ([0.25, 0.75], [0.5, 0.5])
    """
    if not text:
        return [1 / count] * count
    try:
        weights = [float(number) for number in text.split(",")]
    # No weights at all are a wrong number of weights, which the check below refuses.
    except ValueError:
        weights = []
    are_finite = all(math.isfinite(weight) for weight in weights)
    if len(weights) != count or not are_finite:
        raise SettingError("weights", text, f"{count} numbers with commas, one for each adapter")
    return weights


def _check_out(out: Path) -> None:
    """Checks that the folder to write can be made, and is new or empty."""
    from fedsplit.federation.checkpoint import check_folder

    check_folder(out)


def make_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="python -m fedsplit.adapters",
        description="Counts, merges, combines, exports and compares the adapters of finished runs.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, work: Callable[[Call], object], help: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(work=work)
        return added

    _add_folder(command("summary", _summary, "show parameters and file sizes, part by part"), "run", _RUN)
    _add_merge(command("merge", _merge, "write the base model with an adapter added to its weights"))
    unmerge = command("unmerge", _unmerge, "restore the base model, to a rounding, from a merged model")
    _add_folder(unmerge, "model", "folder that merge wrote")
    _add_out(unmerge)
    about_combine = "write the weighted sum of adapters as one, by PEFT's add_weighted_adapter"
    _add_combine(command("combine", _combine, about_combine))
    about_export = "copy adapters, personal ones too, into one folder for PEFT's set_adapter"
    _add_export(command("export", _export, about_export))
    about_push = "upload an adapter with its model card to the Hugging Face Hub"
    _add_push(command("push", _push, about_push))
    about_compare = "compare settings, losses and bytes of two runs, and the distance between their adapters"
    comparison = command("compare", _compare, about_compare)
    _add_folder(comparison, "first", _RUN)
    _add_folder(comparison, "second", "folder of another finished run")
    return parser


_RUN = "folder of a finished run"

_SEVERAL = "folders of finished runs, or of adapters"


def _add_folder(
    parser: argparse.ArgumentParser,
    name: str,
    help: str,
    nargs: str | None = None,
) -> None:
    parser.add_argument(name, type=Path, nargs=nargs, metavar="DIR", help=help)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR", help="folder of the base model, if it was moved")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "run", f"{_RUN}, or of an adapter")
    parser.add_argument("--client", type=int, metavar="N", help="merge this client's personal adapter")
    dtype_help = "type of the weights; 16 bits round a part of the change away"
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help=dtype_help)
    _add_base(parser)
    _add_out(parser)


def _add_combine(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "runs", _SEVERAL, "+")
    parser.add_argument("--weights", default="", metavar="X,X", help="weight of each adapter (default: all equal)")
    how_help = "cat: exact (default); svd: best fit of a rank; linear: rough"
    parser.add_argument("--how", choices=COMBINATIONS, default="cat", help=how_help)
    parser.add_argument("--rank", type=int, metavar="N", help="rank of svd (default: the largest of the adapters)")
    _add_base(parser)
    _add_out(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "runs", _SEVERAL, "+")
    names_help = "names of the adapters (default: the runs')"
    parser.add_argument("--names", default="", metavar="NAME,NAME", help=names_help)
    _add_out(parser)


def _add_push(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "run", f"{_RUN}, or of an adapter")
    parser.add_argument("repository", metavar="REPO", help="repository of the Hub, as org/name; made if need be")
    parser.add_argument("--client", type=int, metavar="N", help="upload this client's personal adapter")
    parser.add_argument("--public", action="store_true", help="make a new repository public; without it, private")
    base_help = "upload the base model, too, for one that is not on the Hub"
    parser.add_argument("--export-base", action="store_true", help=base_help)
    _add_base(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        call = make_parser().read(argv)
        work_of_command = call.flags.work
        # Only `push` has to reach the Hub.
        quieten(offline=work_of_command is not _push)
        lines = work_of_command(call)
        print(*lines, sep="\n")

    return exit_code(work, argv)
