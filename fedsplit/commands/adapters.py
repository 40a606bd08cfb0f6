"""`python -m fedsplit.adapters`: counts, merges, combines, exports and compares the adapters of finished runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.results.finished import (
    ADAPTER_FILES,
    Adapter,
    Run,
    as_tasks,
    check_files,
    check_same_base,
    copy_adapter,
    find_adapter,
    open_run,
)
from fedsplit.settings.choices import DTYPES
from fedsplit.settings.flags import Parser

if TYPE_CHECKING:
    from fedsplit.adaptation.comparison import Distance
    from fedsplit.updates import Adapters

COMBINATIONS = ("cat", "svd", "linear")
"""Ways to combine adapters, by their names in PEFT."""

_MODEL_MISSING = "the model is not here: nobody can tell whether the adapter fits it"


def summary(run: Run) -> list[str]:
    """Returns a table of a run's parameters and adapter files, part by part.

    Args:
        run: A finished run.

    Raises:
        InputError: An adapter of the run cannot be read or does not fit the model.
    """
    from fedsplit.report import aligned
    from fedsplit.results.fitting import read_known

    adapter = run.adapter()
    tensors, model_is_here = read_known(adapter)

    rows: list[tuple[str, ...]] = [("", "trainable", "frozen", "total", "in the file", "file")]
    totals = [0, 0, 0]
    for part, folder in run.parts.items():
        counts = run.summary["parameters"][part]
        numbers = [counts["trainable"], counts["total"] - counts["trainable"], counts["total"]]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        rows.append((part, *_with_commas(numbers), *_file_sizes(replace(adapter, folder=folder))))
    rows.append(("whole", *_with_commas(totals), *_file_sizes(adapter)))
    for client in run.personal:
        personal = run.adapter(client)
        read_known(personal)
        rows.append((f"client {client}", "", "", "", *_file_sizes(personal)))

    config = run.config
    ranks = f"ranks {_ranks(tensors)}"
    kind = ranks if config.lora.method == "lora" else f"{config.lora.method}, {ranks}"
    facts = f"model {config.model}; cut {config.cut}; strategy {config.strategy}; {kind}"
    lines = [facts, *aligned(rows)]
    return lines if model_is_here else [*lines, _MODEL_MISSING]


def _with_commas(numbers: Sequence[int]) -> list[str]:
    return [f"{number:,}" for number in numbers]


def _file_sizes(adapter: Adapter) -> tuple[str, str]:
    """Returns the number of values in an adapter's file, and the size of the file."""
    from fedsplit.report import size
    from fedsplit.results.fitting import read_adapter

    check_files(adapter.folder)
    values = sum(tensor.numel() for tensor in read_adapter(adapter).tensors.values())
    return f"{values:,}", size((adapter.folder / ADAPTER_FILES[1]).stat().st_size)


def _ranks(adapters: Adapters) -> str:
    """Returns the ranks of an adapter's layers, from the smallest to the largest; of AdaLoRA those that are left."""
    ranks = {adapters.rank(layer) for layer in (*adapters.complete, *adapters.stacked)}
    for name, tensor in adapters.tensors.items():
        if name.endswith(".lora_E"):  # AdaLoRA's singular values: a pruned one is zero
            ranks.add(int(tensor.count_nonzero()))
    if not ranks:
        return "none"
    smallest = min(ranks)
    largest = max(ranks)
    return str(smallest) if smallest == largest else f"{smallest} to {largest}"


def compare(first: Run, second: Run) -> list[str]:
    """Returns a table of two runs' settings, losses and bytes, and one of the distances between their adapters."""
    from fedsplit.adaptation.comparison import differing
    from fedsplit.report import aligned, size

    rows: list[tuple[str, ...]] = [("", first.name, second.name)]
    for name, values in differing(first.config, second.config).items():
        rows.append((name, *(_shown(value) for value in values)))
    for when in ("before", "after"):
        losses = [run.summary["eval_loss"][when] for run in (first, second)]
        rows.append((f"held-out loss {when}", *(f"{loss:.4f}" for loss in losses)))
    for name in {**first.summary["bytes"], **second.summary["bytes"]}:
        counts = [run.summary["bytes"].get(name, 0) for run in (first, second)]
        rows.append((f"bytes {name}", *(size(count) for count in counts)))
    return [*aligned(rows), "", *_distances(first, second)]


def _shown(value: object) -> str:
    """Returns the value of a setting as a flag would give it; - for none."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return "-" if value in (None, "") else str(value)


def _distances(first: Run, second: Run) -> list[str]:
    """Returns tables of the distances between two runs' adapters.

    Layers that add s B A are compared by this product. All other tensors are compared as they are.
    """
    from fedsplit.adaptation.comparison import distances, kind_of, loose, tensor_distances
    from fedsplit.results.fitting import read_known

    first_kind = kind_of(first.config)
    second_kind = kind_of(second.config)
    if first_kind != second_kind:
        return [f"the adapters are of different kinds, {first_kind} and {second_kind}, which have no common measure"]

    left, _ = read_known(first.adapter())
    right, _ = read_known(second.adapter())
    layers = distances(left, right)
    tensors = tensor_distances(loose(left), loose(right))

    not_compared = {
        "layers": {*left.complete, *right.complete, *left.stacked, *right.stacked} - layers.keys(),
        "tensors": {*loose(left), *loose(right)} - tensors.keys(),
    }
    notes = [
        f"{len(names)} {kind} are in one of the adapters only, or differ in shape"
        for kind, names in not_compared.items()
        if names
    ]
    if not layers and not tensors:
        return [*notes, "the adapters have nothing to compare"]

    lines: list[str] = []
    if not layers:
        lines.append(f"{first_kind} adds no product of factors: its tensors are compared as they are")
    if layers:
        lines += _table("layer", layers)
    if layers and tensors:
        lines.append("")
    if tensors:
        lines += _table("tensor", tensors)
    return [*lines, *notes]


def _table(kind: str, distances: Mapping[str, Distance]) -> list[str]:
    """Returns a table of distances by name, with the total in the last line."""
    from fedsplit.report import aligned

    rows = [(kind, "‖first‖", "‖second‖", "‖difference‖ / ‖first‖", "cosine")]
    rows += [(name, *_cells(distance)) for name, distance in distances.items()]
    first, *others = distances.values()
    total = sum(others, first)
    return aligned([*rows, ("all", *_cells(total))])


def _cells(distance: Distance) -> tuple[str, str, str, str]:
    relative = "-" if distance.relative is None else f"{distance.relative:.4f}"
    cosine = "-" if distance.cosine is None else f"{distance.cosine:.4f}"
    return f"{distance.first:.4g}", f"{distance.second:.4g}", relative, cosine


def _summary(flags: argparse.Namespace) -> list[str]:
    return summary(open_run(flags.run))


def _compare(flags: argparse.Namespace) -> list[str]:
    return compare(open_run(flags.first), open_run(flags.second))


def _merge(flags: argparse.Namespace) -> list[str]:
    """Writes a merged model, and returns the line to show."""
    adapter = find_adapter(flags.run, flags.client)
    is_run = adapter.folder != flags.run
    if is_run and flags.client is None:
        open_run(flags.run).check_shared()
    adapter = _with_base(adapter, flags.model)
    _check_out(flags.out)
    from fedsplit.results.merging import merge

    classes = merge(adapter, flags.out, flags.dtype)
    decoded = f", decoded from {adapter.quantization} bits" if adapter.quantization else ""
    merged = f"{flags.out}: {adapter.model} with {adapter.folder} added to its weights"
    return [f"{merged}{decoded}, in {flags.dtype}{_classifier_note(classes)}"]


def _classifier_note(classes: int) -> str:
    """Returns how to open a classifier; nothing for a causal LM."""
    return f"; AutoModelForSequenceClassification opens it, with {classes} classes" if classes else ""


def _with_base(adapter: Adapter, model: str) -> Adapter:
    """Returns the adapter with the folder of its base model replaced by `--model`, if given."""
    return replace(adapter, model=model) if model else adapter


def _unmerge(flags: argparse.Namespace) -> list[str]:
    """Writes the base model of a merged model, and returns the line to show."""
    if not flags.model.is_dir():
        raise InputError(f"{flags.model} is no merged model: there is no such folder")
    _check_out(flags.out)
    from fedsplit.results.merging import unmerge

    dtype = unmerge(flags.model, flags.out)
    return [f"{flags.out}: the base without what was merged, in {dtype}"]


def _combine(flags: argparse.Namespace) -> list[str]:
    """Writes the weighted sum of adapters, and returns the line to show."""
    collector = ErrorCollector()
    if len(flags.runs) < 2:
        collector.extend([InputError("combine: one adapter is not possible; allowed: two or more")])
    with collector.collecting():
        weights = _weights(flags.weights, len(flags.runs))
    if flags.rank is not None and (flags.how != "svd" or flags.rank < 1):
        collector.extend([SettingError("rank", flags.rank, "a whole number of at least 1, with --how svd")])
    adapters = []
    for folder in flags.runs:
        with collector.collecting():
            adapters.append(_with_base(find_adapter(folder), flags.model))
    with collector.collecting():
        _check_out(flags.out)
    collector.check()

    check_same_base(adapters)
    from fedsplit.results.combining import combine

    rank = combine(adapters, weights, flags.how, flags.out, flags.rank)
    terms = " + ".join(f"{weight:g} * {adapter.name}" for weight, adapter in zip(weights, adapters, strict=True))
    return [f"{flags.out}: {terms} by {flags.how}, of rank {rank}"]


def _export(flags: argparse.Namespace) -> list[str]:
    """Writes a folder of adapters for PEFT, and returns the Python lines that open them."""
    adapters = []
    collector = ErrorCollector()
    for folder in flags.runs:
        with collector.collecting():
            adapters.append(find_adapter(folder))
            is_run = not (folder / ADAPTER_FILES[0]).is_file()
            if is_run:
                run = open_run(folder)
                adapters += [run.adapter(client) for client in run.personal]
    with collector.collecting():
        _check_out(flags.out)
    collector.check()

    check_same_base(adapters)
    tasks = as_tasks(adapters, flags.names.split(",") if flags.names else ())
    from fedsplit.durable import write_folder
    from fedsplit.results.fitting import read_known
    from fedsplit.results.whole import check_same_head

    known = {adapter.folder: read_known(adapter) for adapter in adapters}
    classes = check_same_head({folder: tensors for folder, (tensors, _) in known.items()})

    def fill(draft: Path) -> None:
        for name, adapter in tasks.items():
            copy_adapter(adapter, draft / name)

    write_folder(flags.out, fill)
    first, *others = tasks
    last = [first, *others][-1]
    lines = [
        f"{flags.out}: {', '.join(tasks)}, of {adapters[0].model}{_classifier_note(classes)}",
        f'model = PeftModel.from_pretrained(base, "{flags.out}/{first}", adapter_name="{first}")',
        *(f'model.load_adapter("{flags.out}/{name}", adapter_name="{name}")' for name in others),
        f'model.set_adapter("{last}")',
    ]
    models_are_here = all(is_here for _, is_here in known.values())
    return lines if models_are_here else [*lines, f"# {_MODEL_MISSING}"]


def _weights(text: str, count: int) -> list[float]:
    """Returns the weights of `--weights`, separated by commas; equal weights that sum to 1 if none are given."""
    try:
        weights = [float(number) for number in text.split(",")] if text else [1 / count] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
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

    def command(name: str, work: Callable[[argparse.Namespace], object], help: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(work=work)
        return added

    def folders(added: argparse.ArgumentParser, name: str, help: str, nargs: str | None = None) -> None:
        added.add_argument(name, type=Path, nargs=nargs, metavar="DIR", help=help)

    def out(added: argparse.ArgumentParser, movable: bool = False) -> None:
        if movable:
            added.add_argument("--model", default="", metavar="DIR", help="folder of the base model, if it was moved")
        added.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")

    run = "folder of a finished run"
    several = "folders of finished runs, or of adapters"

    folders(command("summary", _summary, "show parameters and file sizes, part by part"), "run", run)
    merge = command("merge", _merge, "write the base model with an adapter added to its weights")
    folders(merge, "run", f"{run}, or of an adapter")
    merge.add_argument("--client", type=int, metavar="N", help="merge this client's personal adapter")
    merge.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="type of the weights; 16 bits round a part of the change away",
    )
    out(merge, movable=True)
    unmerge = command("unmerge", _unmerge, "restore the base model, to a rounding, from a merged model")
    folders(unmerge, "model", "folder that merge wrote")
    out(unmerge)
    combine = command("combine", _combine, "write the weighted sum of adapters as one, by PEFT's add_weighted_adapter")
    folders(combine, "runs", several, "+")
    combine.add_argument("--weights", default="", metavar="X,X", help="weight of each adapter (default: all equal)")
    combine.add_argument(
        "--how",
        choices=COMBINATIONS,
        default="cat",
        help="cat: exact (default); svd: best fit of a rank; linear: rough",
    )
    combine.add_argument("--rank", type=int, metavar="N", help="rank of svd (default: the largest of the adapters)")
    out(combine, movable=True)
    export = command("export", _export, "copy adapters, personal ones too, into one folder for PEFT's set_adapter")
    folders(export, "runs", several, "+")
    export.add_argument("--names", default="", metavar="NAME,NAME", help="names of the adapters (default: the runs')")
    out(export)
    compare = command(
        "compare", _compare, "compare settings, losses and bytes of two runs, and the distance between their adapters"
    )
    folders(compare, "first", run)
    folders(compare, "second", "folder of another finished run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        flags = make_parser().parse_args(argv)
        quieten()
        print(*flags.work(flags), sep="\n")

    return exit_code(work, argv)
