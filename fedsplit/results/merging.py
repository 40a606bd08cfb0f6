"""Merges an adapter into the weights of the base model, and restores the base model from a merged model.

A merged folder is an ordinary model. The folder also holds the merged adapter and a record, so that `unmerge` can
subtract the adapter. The sum is computed in float64 and rounded once to float32. So the restored weights differ from
the base by one rounding at most, and not at all if the base has a narrower type.

An adapter with a classification head makes a classifier of sequences without a head for tokens. The base's head for
tokens is kept beside the adapter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsplit.adaptation.lora import SCORE_WEIGHT
from fedsplit.adaptation.prompts import SAVED
from fedsplit.durable import write_folder
from fedsplit.errors import InputError
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.derivation import family_of
from fedsplit.model.devices import TYPES
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.unsplit import empty_model, load_unsplit
from fedsplit.model.vocabulary import tokenizer_files
from fedsplit.model.weight_files import find_tensors
from fedsplit.results.finished import ADAPTER_FILES, Adapter, copy_adapter
from fedsplit.results.fitting import classes_in, more_than_factors, read_fitting
from fedsplit.results.whole import merged, open_held
from fedsplit.tensor_files import load_tensors, write_tensors
from fedsplit.updates import Adapters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

RECORD = "merged.json"
"""File of a merged folder with the record of the merge."""

MERGED = "merged_adapter"
"""Subfolder of a merged folder with the adapter."""

BASE_HEAD = "base_head.safetensors"
"""File beside the merged adapter with the base's head, if the adapter replaced an untied head."""

GENERATION = "generation_config.json"
"""File with a model's settings for generation. The end tokens in the file win over the end tokens of config.json."""

_NAMED = ("pad_token_id", "id2label", "label2id")
"""Keys of config.json in which a classifier differs from its base."""

_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types narrower than float32, by name."""


def check_mergeable(adapter: Adapter, tensors: Adapters) -> None:
    """Checks that an adapter changes weights.

    Raises:
        InputError: The adapter consists of virtual tokens or prefixes.
    """
    if SAVED in tensors.tensors:
        reason = "virtual tokens or prefixes, which change no weight: there is nothing to add to the model's"
        raise InputError(f"the adapter in {adapter.folder} is made of {reason}")


def _untie(model: PreTrainedModel, changes: Adapters) -> bool:
    """Gives a tied head a copy of the embedding's weight, if an adapter changes the head.

    Returns:
        True if head and embedding were separated.
    """
    head = model.get_output_embeddings()
    is_changed = any(name.startswith(f"{HEAD}.") for name in changes.tensors)
    is_tied = head.weight is model.get_input_embeddings().weight
    if not is_changed or not is_tied:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def _replace_head(model: PreTrainedModel, weight: Tensor | None) -> Tensor | None:
    """Replaces the head's weight, if a weight is given, and returns the previous weight."""
    head = model.get_output_embeddings()
    before: Tensor = head.weight.detach()
    if weight is None:
        return None
    head.weight = nn.Parameter(weight.to(before.dtype))
    return before


@torch.no_grad()
def _add(model: PreTrainedModel, adapters: Adapters, sign: float) -> None:
    """Adds an adapter's changes to the model's weights, each with one rounding.

    Args:
        model: The model.
        adapters: The adapter.
        sign: 1.0 to add the changes, -1.0 to subtract them.
    """
    for layer in adapters.complete:
        weight = model.get_submodule(layer).weight
        change = adapters.change(layer)
        dense = change.up @ change.down
        if adapters.layers[layer].transposed:  # transformers' Conv1D holds (in, out)
            dense = dense.T
        weight.copy_(weight.double() + sign * dense)
    for layer in adapters.stacked:
        weight = model.get_parameter(adapters.weight_name(layer))
        of_experts = [change.up @ change.down for change in adapters.changes(layer)]
        weight.copy_(weight.double() + sign * torch.stack(of_experts))


def _token_head(adapter: Adapter, classifier: PreTrainedModel) -> dict[str, Tensor]:
    """Reads the base's head for tokens from the checkpoint, since a classifier does not load the head.

    Returns:
        The weight (V, D) and the bias (V,) of the head by name, in the type of the adapter's run. A weight that is tied
        to the embedding and a tensor that the checkpoint does not have are left out.
    """
    base = empty_model(adapter.model_path)
    checkpoint = CheckpointReader(adapter.model_path, base, TYPES[adapter.dtype])
    head = family_of(base.config).head  # a file beside the adapter always calls the head `lm_head`
    tensors = {}
    for name, _ in base.get_submodule(head).named_parameters():
        is_tied = name == "weight" and classifier.config.tie_word_embeddings
        if not is_tied and checkpoint.has(f"{head}.{name}"):
            tensors[f"{HEAD}.{name}"] = checkpoint.parameter(f"{head}.{name}").detach().float()
    return tensors


@torch.no_grad()
def _set_classifier(model: PreTrainedModel, weight: Tensor, names: Sequence[str]) -> None:
    """Gives a classifier the head (C, D) of an adapter, and the names of the classes if known."""
    model.score.weight = nn.Parameter(weight.to(model.score.weight.dtype))
    if len(names) == len(weight):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}


def _type_of(weights: Iterable[Tensor]) -> str:
    """Returns the name of the narrowest type that holds all weights without rounding.

    Example:
        >>> _type_of([torch.tensor([0.5, 2.0])]), _type_of([torch.tensor([0.1])])
        ('bfloat16', 'float32')
    """
    all_weights = list(weights)
    for name, dtype in _NARROW.items():
        if all(_is_exact(weight, dtype) for weight in all_weights):
            return name
    return "float32"


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Returns True if a type holds all values of a weight without rounding."""
    narrowed = weight.to(dtype)
    return torch.equal(weight, narrowed.to(weight.dtype))


def _base_weights(model: PreTrainedModel, head: Tensor | None) -> Iterable[Tensor]:
    """Yields the weights of the base: the given head, and the opened model's weights except a classifier's head."""
    for name, weight in model.named_parameters():
        if name != SCORE_WEIGHT:
            yield weight
    if head is not None:
        yield head


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """Returns the sha256 of each file, by name."""
    digests = {}
    for file in sorted(files):
        with open(file, "rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _are_as_merged(folder: Path, weights: Mapping[str, str]) -> bool:
    """Returns True if the weights of a merged folder have not changed since the merge.

    Args:
        folder: The merged folder.
        weights: sha256 of each file of weights at the merge.
    """
    try:
        are_unchanged = _digests(folder / name for name in weights) == weights
        # transformers may load a later file in place of the merged weights.
        loaded = {file.name for file in find_tensors(folder).values()}
        return are_unchanged and loaded == weights.keys()
    except (OSError, ValueError):
        return False


def _save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Saves a model, with the tokenizer of a source folder."""
    model.save_pretrained(folder)
    files = tokenizer_files(source)
    if not (folder / GENERATION).exists():  # transformers writes no such file for a classifier
        files.append(source / GENERATION)
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def merge(adapter: Adapter, out: Path, dtype: str = "fp32") -> int:
    """Writes the base model with an adapter added to the weights.

    Args:
        adapter: The adapter. An adapter with a classification head makes a classifier for
            `AutoModelForSequenceClassification`.
        out: Folder to write.
        dtype: Type of the weights. A narrower type than fp32 rounds a part of the change away.

    Returns:
        The number of classes; 0 for a causal LM.

    Raises:
        InputError: The base model is missing, or the adapter does not fit the model or changes no weights.
    """
    changes = read_fitting(adapter)
    check_mergeable(adapter, changes)
    classes = classes_in(changes)
    base = open_held(adapter, dense=True, classes=classes).float()
    base_head = _token_head(adapter, base) if classes else {}
    base_type = _type_of(_base_weights(base, base_head.get(HEAD_WEIGHT)))  # before the sum, which fits no narrow type

    was_tied = False
    if not changes.layers:  # a kind of adapter that only PEFT can add
        base = merged(base, adapter)
    elif classes:
        _add(base, changes, sign=1.0)
    else:
        was_tied = _untie(base, changes)
        _add(base, changes, sign=1.0)
        replaced = _replace_head(base, changes.tensors.get(HEAD_WEIGHT))
        base_head = {} if replaced is None else {HEAD_WEIGHT: replaced}
    if classes:
        _set_classifier(base, changes.tensors[SCORE_WEIGHT], adapter.classes)
    base.to(TYPES[dtype])
    _check_finite(base, dtype)

    record = {
        "base": adapter.model,
        "base_type": base_type,
        "adapter": str(adapter.folder),
        "tied": was_tied,
    }
    if classes:
        record |= {"classes": classes, "named": _base_settings(adapter.model_path)}

    def fill(draft: Path) -> None:
        _save(base, adapter.model_path, draft)
        copy_adapter(adapter, draft / MERGED)
        if base_head and not was_tied:  # a tied head is the embedding, which stays
            write_tensors(draft / MERGED / BASE_HEAD, base_head)
        _write_record(draft, {**record, "dtype": dtype})

    write_folder(out, fill)
    return classes


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a merged folder, with the sha256 of the weights."""
    document = {**record, "weights": _digests({*find_tensors(folder).values()})}
    text = json.dumps(document, indent=2) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def _check_finite(model: PreTrainedModel, dtype: str) -> None:
    """Checks that merged weights are finite: a narrow type can overflow.

    Raises:
        InputError: A weight has a value that is not finite.
    """
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"with the adapter added, {name} has values that are no finite numbers in {dtype}")


def _base_settings(folder: Path) -> dict[str, Any]:
    """Returns the values in a base's config.json that `merge` overwrites for a classifier."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: document[name] for name in _NAMED if name in document}


def _without_classes(config: PretrainedConfig, named: Mapping[str, Any]) -> None:
    """Restores the keys of a configuration that `merge` overwrote for a classifier.

    Args:
        config: The classifier's configuration.
        named: The base's values of the keys.
    """
    config.pad_token_id = None
    config.num_labels = 0  # a change of the number makes transformers reset the names in the next line
    config.num_labels = 2  # the default of transformers, which it does not write to config.json
    for name, value in named.items():
        setattr(config, name, value)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of a merged folder.

    Raises:
        InputError: The folder holds no merged model, or the weights have changed since the merge.

    Example:
        >>> read_record(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no merged model: there is no merged.json that can be read in it
    """
    adapter = folder / MERGED
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        weights = dict(record["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no merged model: there is no {RECORD} that can be read in it") from None
    if not all((adapter / name).is_file() for name in ADAPTER_FILES):
        raise InputError(f"{folder} cannot be unmerged: its {MERGED} is gone")
    if not _are_as_merged(folder, weights):
        raise InputError(f"{folder} cannot be unmerged: its weights are not those that were merged")
    return record


def unmerge(folder: Path, out: Path) -> str:
    """Writes the base model of a merged model, by subtracting the adapter.

    Args:
        folder: The merged folder.
        out: Folder to write, with the weights of the base up to one rounding.

    Returns:
        The name of the type of the base's weights.

    Raises:
        InputError: The folder holds no merged model, the weights have changed since the merge, or the adapter does more
            than add to weights.
    """
    record = read_record(folder)
    adapter = Adapter(folder / MERGED, str(folder), "fp32", MERGED)
    changes = read_fitting(adapter)
    if not changes.layers:
        reason = f"its adapter does more than to add something to the weights ({more_than_factors(adapter)})"
        raise InputError(f"{folder} cannot be unmerged: {reason}; the base is {record['base']}")

    model = load_unsplit(folder, torch.float32)  # a causal LM, as the base was
    _add(model, changes, sign=-1.0)
    if record.get("tied"):  # the merge separated head and embedding, and the embedding did not change
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
    elif (folder / MERGED / BASE_HEAD).is_file():
        head = model.get_output_embeddings()
        for name, tensor in load_tensors(folder / MERGED / BASE_HEAD).items():
            leaf = name.removeprefix(f"{HEAD}.")
            setattr(head, leaf, nn.Parameter(tensor.to(head.weight.dtype)))
    if record.get("classes"):
        _without_classes(model.config, record["named"])

    # A merge in 16 bits has rounded the sum. The sum without the adapter then fits no 16-bit type.
    base_type = str(record["base_type"]) if record["dtype"] == "fp32" else "float32"
    model.to(_NARROW.get(base_type, torch.float32))
    write_folder(out, lambda draft: _save(model, folder, draft))
    return base_type
