"""Tables about adapters: parameters and files of a run, and two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fedsplit.results.finished import ADAPTER_FILES, Adapter, Run, check_files

if TYPE_CHECKING:
    from fedsplit.adaptation.comparison import Distance
    from fedsplit.updates import Adapters

MODEL_MISSING = "the model is not here: nobody can tell whether the adapter fits it"
"""Note about an adapter with a base model that this machine does not have."""


def summary(run: Run) -> list[str]:
    """Returns a table of a run's parameters and adapter files, part by part.

    Args:
        run: A finished run.

    Raises:
        InputError: An adapter of the run cannot be read or does not fit the model.
    """
    from fedsplit.formatting import aligned
    from fedsplit.results.fitting import read_known

    adapter = run.adapter()
    tensors, model_is_here = read_known(adapter)

    rows: list[tuple[str, ...]] = [("", "trainable", "frozen", "total", "in the file", "file")]
    trainable = 0
    total = 0
    for part, folder in run.parts.items():
        counts = run.summary["parameters"][part]
        trainable += counts["trainable"]
        total += counts["total"]
        sizes = _file_sizes(replace(adapter, folder=folder))
        rows.append((part, *_parameters(counts["trainable"], counts["total"]), *sizes))
    rows.append(("whole", *_parameters(trainable, total), *_file_sizes(adapter)))
    for client in run.personal:
        personal = run.adapter(client)
        read_known(personal)  # raises the error of a broken file, in the words for users
        rows.append((f"client {client}", "", "", "", *_file_sizes(personal)))

    config = run.config
    facts = [f"model {config.model}", f"cut {config.cut}", f"strategy {config.strategy}"]
    ranks = f"ranks {_ranks(tensors)}"
    facts.append(ranks if config.lora.method == "lora" else f"{config.lora.method}, {ranks}")
    lines = ["; ".join(facts), *aligned(rows)]
    if not model_is_here:
        lines.append(MODEL_MISSING)
    return lines


def _parameters(trainable: int, total: int) -> tuple[str, str, str]:
    """Returns the cells of a row with the numbers of trainable, frozen and all parameters.

    Example:
        >>> _parameters(trainable=1000, total=3500)
        ('1,000', '2,500', '3,500')
    """
    frozen = total - trainable
    return f"{trainable:,}", f"{frozen:,}", f"{total:,}"


def _file_sizes(adapter: Adapter) -> tuple[str, str]:
    """Returns the number of values in an adapter's file, and the size of the file."""
    from fedsplit.formatting import size
    from fedsplit.results.fitting import read_adapter

    check_files(adapter.folder)
    tensors = read_adapter(adapter).tensors
    values = sum(tensor.numel() for tensor in tensors.values())
    file = adapter.folder / ADAPTER_FILES[1]
    return f"{values:,}", size(file.stat().st_size)


def _ranks(adapters: Adapters) -> str:
    """Returns the smallest and the largest rank of an adapter's layers; under AdaLoRA, of the ranks after pruning."""
    ranks = {adapters.rank(layer) for layer in (*adapters.complete, *adapters.stacked)}
    for name, tensor in adapters.tensors.items():
        if name.endswith(".lora_E"):  # AdaLoRA's singular values: a pruned value is zero
            ranks.add(int(tensor.count_nonzero()))
    if not ranks:
        return "none"
    smallest = min(ranks)
    largest = max(ranks)
    return str(smallest) if smallest == largest else f"{smallest} to {largest}"


def compare(first: Run, second: Run) -> list[str]:
    """Compares two runs.

    Returns:
        The lines of a table with the different settings, the losses and the bytes, and of a table with the distances
        between the adapters.

    Raises:
        InputError: An adapter cannot be read, or does not fit the model.
    """
    from fedsplit.adaptation.comparison import differing
    from fedsplit.formatting import aligned, size

    rows: list[tuple[str, str, str]] = [("", first.name, second.name)]
    for name, (left, right) in differing(first.config, second.config).items():
        rows.append((name, _shown(left), _shown(right)))
    for when in ("before", "after"):
        left_loss = first.summary["eval_loss"][when]
        right_loss = second.summary["eval_loss"][when]
        rows.append((f"held-out loss {when}", f"{left_loss:.4f}", f"{right_loss:.4f}"))

    # A kind of bytes that only one run has counts as zero in the other run.
    left_bytes = first.summary["bytes"]
    right_bytes = second.summary["bytes"]
    for name in {**left_bytes, **right_bytes}:
        left_size = size(left_bytes.get(name, 0))
        right_size = size(right_bytes.get(name, 0))
        rows.append((f"bytes {name}", left_size, right_size))
    return [*aligned(rows), "", *_distances(first, second)]


def _shown(value: object) -> str:
    """Returns the value of a setting in the form of a flag, or - without a value.

    Example:
        >>> _shown([8, 4]), _shown("")
        ('8,4', '-')
    """
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if value is None or value == "":
        return "-"
    return str(value)


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

    all_layers = {*left.complete, *right.complete, *left.stacked, *right.stacked}
    all_tensors = {*loose(left), *loose(right)}
    notes = []
    for kind, names, compared in (("layers", all_layers, layers), ("tensors", all_tensors, tensors)):
        not_compared = len(names) - len(compared)
        if not_compared:
            notes.append(f"{not_compared} {kind} are in one of the adapters only, or differ in shape")
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
    from fedsplit.formatting import aligned

    rows = [(kind, "‖first‖", "‖second‖", "‖difference‖ / ‖first‖", "cosine")]
    for name, distance in distances.items():
        rows.append((name, *_cells(distance)))
    first, *others = distances.values()
    total = sum(others, first)  # squares of norms add up, so the sum is the distance over all rows
    rows.append(("all", *_cells(total)))
    return aligned(rows)


def _cells(distance: Distance) -> tuple[str, str, str, str]:
    """Returns the cells of a distance, with - for a ratio to a norm of zero."""
    relative = "-" if distance.relative is None else f"{distance.relative:.4f}"
    cosine = "-" if distance.cosine is None else f"{distance.cosine:.4f}"
    return f"{distance.first:.4g}", f"{distance.second:.4g}", relative, cosine
