"""`python -m fedsplit.adapters`: what can be done with the adapters of finished runs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.allowed import DTYPES, InputError, SettingError
from fedsplit.command import exit_code
from fedsplit.environment import quieten
from fedsplit.flags import Parser
from fedsplit.results.finished import (
    ADAPTER_FILES,
    Adapter,
    Run,
    as_tasks,
    check_same_base,
    copy_adapter,
    find_adapter,
    open_run,
    whole_files,
)

if TYPE_CHECKING:
    from fedsplit.adaptation.comparison import Distance
    from fedsplit.updates import Adapters

METHODS = ("cat", "svd", "linear")
"""Ways to combine adapters, by the names that PEFT gives them."""

_AWAY = "the model is not here: nobody can tell whether the adapter fits it"


def summary(run: Run) -> list[str]:
    """What a run trained and what it left behind, part by part."""
    from fedsplit.report import aligned
    from fedsplit.results.fitting import read_known

    whole, is_here = read_known(run.adapter())
    rows: list[tuple[str, ...]] = [("", "trainable", "frozen", "total", "in the file", "file")]
    totals = [0, 0, 0]
    for part, folder in run.parts.items():
        counts = run.summary["parameters"][part]
        own = counts["trainable"], counts["total"] - counts["trainable"], counts["total"]
        totals = [before + more for before, more in zip(totals, own, strict=True)]
        rows.append((part, *(f"{n:,}" for n in own), *_filed(replace(run.adapter(), folder=folder))))
    rows.append(("whole", *(f"{n:,}" for n in totals), *_filed(run.adapter())))
    for client in run.personal:
        read_known(run.adapter(client))
        rows.append((f"client {client}", "", "", "", *_filed(run.adapter(client))))
    config = run.config
    kind = f"ranks {_ranks(whole)}" if config.lora.method == "lora" else f"{config.lora.method}, ranks {_ranks(whole)}"
    about = f"model {config.model}; cut {config.cut}; strategy {config.strategy}; {kind}"
    return [about, *aligned(rows), *([_AWAY] if not is_here else [])]


def _filed(adapter: Adapter) -> tuple[str, str]:
    """How many numbers are in an adapter's file, and how large it is."""
    from fedsplit.report import size
    from fedsplit.results.fitting import read_adapter

    tensors = read_adapter(whole_files(adapter)).tensors
    return f"{sum(t.numel() for t in tensors.values()):,}", size((adapter.folder / ADAPTER_FILES[1]).stat().st_size)


def _ranks(read: Adapters) -> str:
    """The ranks of the layers in the adapter, from the least to the largest; of AdaLoRA those that are left."""
    dealt = {int(t.count_nonzero()) for name, t in read.tensors.items() if name.endswith(".lora_E")}
    ranks = sorted({read.rank(layer) for layer in (*read.complete, *read.stacked)} | dealt)
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"


def compare(first: Run, second: Run) -> list[str]:
    """Two runs side by side."""
    from fedsplit.adaptation.comparison import differing
    from fedsplit.report import aligned, size

    rows: list[tuple[str, ...]] = [("", first.name, second.name)]
    for name, (one, two) in differing(first.config, second.config).items():
        rows.append((name, *(_shown(value) for value in (one, two))))
    for when in ("before", "after"):
        rows.append((f"held-out loss {when}", *(f"{run.summary['eval_loss'][when]:.4f}" for run in (first, second))))
    names = {**first.summary["bytes"], **second.summary["bytes"]}
    for name in names:
        counts = [run.summary["bytes"].get(name, 0) for run in (first, second)]
        rows.append((f"bytes {name}", size(counts[0]), size(counts[1])))
    return [*aligned(rows), "", *_distances(first, second)]


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return "-" if value in (None, "") else str(value)


def _distances(first: Run, second: Run) -> list[str]:
    """How far apart the adapters are: layer by layer where they add s B A, and tensor by tensor where they do not."""
    from fedsplit.adaptation.comparison import distances, kind_of, loose, tensor_distances
    from fedsplit.results.fitting import read_known

    kinds = [kind_of(run.config) for run in (first, second)]
    if kinds[0] != kinds[1]:
        return [f"the adapters are of different kinds, {kinds[0]} and {kinds[1]}, which have no common measure"]
    one, two = (read_known(run.adapter())[0] for run in (first, second))
    layers, tensors = distances(one, two), tensor_distances(loose(one), loose(two))
    missed = {
        "layers": {*one.complete, *two.complete, *one.stacked, *two.stacked} - layers.keys(),
        "tensors": {*loose(one), *loose(two)} - tensors.keys(),
    }
    end = [
        f"{len(names)} {what} are in one of the adapters only, or differ in shape"
        for what, names in missed.items()
        if names
    ]
    if not layers and not tensors:
        return [*end, "the adapters have nothing to compare"]
    tables = [_table(what, found) for what, found in (("layer", layers), ("tensor", tensors)) if found]
    shown = [line for table in tables for line in ("", *table)][1:]
    if tensors and not layers:
        shown = [f"{kinds[0]} adds no product of factors: what is compared are its tensors as they are", *shown]
    return [*shown, *end]


def _table(what: str, found: Mapping[str, Distance]) -> list[str]:
    """Distances by name, and all of them as one."""
    from fedsplit.report import aligned

    rows = [(what, "‖first‖", "‖second‖", "‖difference‖ / ‖first‖", "cosine")]
    rows += [(name, *_numbers(one)) for name, one in found.items()]
    whole, *rest = found.values()
    return aligned([*rows, ("all", *_numbers(sum(rest, whole)))])


def _numbers(found: Distance) -> tuple[str, str, str, str]:
    relative, cosine = (f"{value:.4f}" if value is not None else "-" for value in (found.relative, found.cosine))
    return f"{found.first:.4g}", f"{found.second:.4g}", relative, cosine


def _summary(asked: argparse.Namespace) -> list[str]:
    return summary(open_run(asked.run))


def _compare(asked: argparse.Namespace) -> list[str]:
    return compare(open_run(asked.first), open_run(asked.second))


def _merge(asked: argparse.Namespace) -> list[str]:
    adapter = find_adapter(asked.run, asked.client)
    if asked.client is None and adapter.folder != asked.run:
        _check_single(open_run(asked.run))
    adapter = _moved(adapter, asked.model)
    _check_out(asked.out)
    from fedsplit.results.merging import merge

    classes = merge(adapter, asked.out, asked.dtype)
    decoded = f", decoded from {adapter.quantization} bits" if adapter.quantization else ""
    how = f"{decoded}, in {asked.dtype}{_classifier(classes)}"
    return [f"{asked.out}: {adapter.model} with {adapter.folder} added to its weights{how}"]


def _classifier(classes: int) -> str:
    """What opens a model with a head of classes; nothing to be said of a causal LM."""
    return f"; AutoModelForSequenceClassification opens it, with {classes} classes" if classes else ""


def _moved(adapter: Adapter, model: str) -> Adapter:
    """An adapter whose base model lies elsewhere now, where that is said."""
    return replace(adapter, model=model) if model else adapter


def _check_single(run: Run) -> None:
    """Makes sure that a run has one adapter for all.

    Raises:
        InputError: Every client has one of its own.
    """
    if run.personal:
        numbers = ", ".join(map(str, run.personal))
        raise InputError(f"in the run in {run.path} every client has an adapter of its own: say --client, {numbers}")


def _unmerge(asked: argparse.Namespace) -> list[str]:
    if not asked.model.is_dir():
        raise InputError(f"{asked.model} is no merged model: there is no such folder")
    _check_out(asked.out)
    from fedsplit.results.merging import unmerge

    return [f"{asked.out}: the base without what was merged, in {unmerge(asked.model, asked.out)}"]


def _combine(asked: argparse.Namespace) -> list[str]:
    if len(asked.runs) < 2:
        raise InputError("combine: one adapter is not possible; allowed: two or more")
    weights = _weights(asked.weights, len(asked.runs))
    if asked.rank is not None and (asked.how != "svd" or asked.rank < 1):
        raise SettingError("rank", asked.rank, "a whole number of at least 1, with --how svd")
    adapters = [_moved(find_adapter(run), asked.model) for run in asked.runs]
    check_same_base(adapters)
    _check_out(asked.out)
    from fedsplit.results.merging import combine

    rank = combine(adapters, weights, asked.how, asked.out, asked.rank)
    parts = " + ".join(f"{weight:g} * {adapter.name}" for weight, adapter in zip(weights, adapters, strict=True))
    return [f"{asked.out}: {parts} by {asked.how}, of rank {rank}"]


def _export(asked: argparse.Namespace) -> list[str]:
    adapters = []
    for folder in asked.runs:
        adapters.append(find_adapter(folder))
        if not (folder / ADAPTER_FILES[0]).is_file():
            run = open_run(folder)
            adapters += [run.adapter(client) for client in run.personal]
    check_same_base(adapters)
    tasks = as_tasks(adapters, asked.names.split(",") if asked.names else ())
    _check_out(asked.out)
    from fedsplit.durable import write_folder
    from fedsplit.results.fitting import read_known
    from fedsplit.results.whole import check_same_head

    read = {adapter.folder: read_known(adapter) for adapter in adapters}
    classes = check_same_head({folder: tensors for folder, (tensors, _) in read.items()})
    is_here = all(fits for _, fits in read.values())

    def fill(draft: Path) -> None:
        for name, adapter in tasks.items():
            copy_adapter(adapter, draft / name)

    write_folder(asked.out, fill)
    first, *others = tasks
    code = [f'model = PeftModel.from_pretrained(base, "{asked.out}/{first}", adapter_name="{first}")']
    code += [f'model.load_adapter("{asked.out}/{name}", adapter_name="{name}")' for name in others]
    about = f"{asked.out}: {', '.join(tasks)}, of {adapters[0].model}{_classifier(classes)}"
    code.append(f'model.set_adapter("{[*tasks][-1]}")')
    return [about, *code, *([f"# {_AWAY}"] if not is_here else [])]


def _weights(text: str, count: int) -> list[float]:
    """Numbers with commas; equal ones where none are given."""
    try:
        weights = [float(number) for number in text.split(",")] if text else [1 / count] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise SettingError("weights", text, f"{count} numbers with commas, one for each adapter")
    return weights


def _check_out(out: Path) -> None:
    from fedsplit.federation.checkpoint import check_folder

    check_folder(out)


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.adapters",
        description="Counts, merges, combines, collects and compares the adapters of finished runs.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, work: Any, help: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(work=work)
        return added

    def folders(added: argparse.ArgumentParser, name: str, help: str, nargs: str | None = None) -> None:
        added.add_argument(name, type=Path, nargs=nargs, metavar="DIR", help=help)

    def out(added: argparse.ArgumentParser, movable: bool = False) -> None:
        if movable:
            added.add_argument("--model", default="", metavar="DIR", help="where the base model lies now, if moved")
        added.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")

    run, several = "the folder of a finished run", "folders of finished runs, or of adapters"
    folders(command("summary", _summary, "parameters and sizes of files, part by part"), "run", run)
    merge = command("merge", _merge, "the base with the adapter added to its weights, as a model of its own")
    folders(merge, "run", f"{run}, or of an adapter")
    merge.add_argument("--client", type=int, metavar="N", help="this client's own adapter, where it has one")
    merge.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="type of the weights; 16 bits round some of the change away",
    )
    out(merge, movable=True)
    unmerge = command("unmerge", _unmerge, "the base again, to a rounding, from what merge wrote")
    folders(unmerge, "model", "the folder that merge wrote")
    out(unmerge)
    combine = command("combine", _combine, "several adapters as one, weighted, by PEFT's add_weighted_adapter")
    folders(combine, "runs", several, "+")
    combine.add_argument("--weights", default="", metavar="X,X", help="what each counts (default: all the same)")
    combine.add_argument(
        "--how", choices=METHODS, default="cat", help="cat: exact (default); svd: the best fit of a rank; linear: rough"
    )
    combine.add_argument("--rank", type=int, metavar="N", help="of svd (default: the largest of the adapters')")
    out(combine, movable=True)
    export = command("export", _export, "adapters, clients' own too, as a folder a task, for PEFT's set_adapter")
    folders(export, "runs", several, "+")
    export.add_argument("--names", default="", metavar="NAME,NAME", help="names of the tasks (default: the runs')")
    out(export)
    compare = command(
        "compare", _compare, "settings, losses and bytes of two runs, and how far their adapters are apart"
    )
    folders(compare, "first", run)
    folders(compare, "second", "that of another")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where it ended well, 2 where it was asked for wrongly, 130 on Ctrl-C."""

    def work() -> None:
        asked = make_parser().parse_args(argv)
        quieten()
        print(*asked.work(asked), sep="\n")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
