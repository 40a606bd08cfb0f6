"""An adapter added to its base model's weights, and taken out again; adapters combined.

A merged folder is an ordinary model. Beside it lie the adapter that was merged, and a record of it, so that the
adapter can be subtracted again: the sum is made in float64 and rounded once to float32, so what comes back differs
from the base by a rounding at most, and by nothing where the base had a narrower type.

An adapter with a head of classes makes a classifier of sequences. That has no head for tokens: where the base has
one of its own, it is kept beside the adapter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from fedsplit.adaptation.lora import SCORE_WEIGHT
from fedsplit.adaptation.prompts import SAVED
from fedsplit.allowed import InputError
from fedsplit.durable import write_folder
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.devices import TYPES
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.sources import to_peft
from fedsplit.model.unsplit import empty_model, load_unsplit
from fedsplit.model.vocabulary import TOKENIZER_FILES
from fedsplit.model.weight_files import find_tensors
from fedsplit.results.finished import ADAPTER_FILES, Adapter, check_same_base, copy_adapter
from fedsplit.results.fitting import classes_in, more_than_factors, read_fitting, reason_of
from fedsplit.results.whole import merged, open_base, open_held
from fedsplit.tensor_files import load_tensors, write_tensors
from fedsplit.updates import Adapters

RECORD = "merged.json"
"""What was merged, in a merged folder."""

MERGED = "merged_adapter"
"""The adapter that was merged, in a merged folder."""

BASE_HEAD = "base_head.safetensors"
"""The head as it was, beside an adapter that put another in its place, where it was not tied to the embedding."""

GENERATION = "generation_config.json"
"""How a model generates text; its end tokens go before those of config.json."""

_NAMED = ("pad_token_id", "id2label", "label2id")
"""What a classifier's config.json says that its base's does not, or says otherwise."""

_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_mergeable(adapter: Adapter, read: Adapters) -> None:
    """Makes sure that an adapter is a change of weights.

    Raises:
        InputError: It is not.
    """
    if SAVED in read.tensors:
        words = "virtual tokens or prefixes, which change no weight: there is nothing to add to the model's"
        raise InputError(f"the adapter in {adapter.folder} is made of {words}")


def _untie(model: Any, changes: Adapters) -> bool:
    """Gives the head a weight of its own where an adapter changes it; whether it had shared the embedding's."""
    head, words = model.lm_head, model.get_input_embeddings()
    changed = any(name.startswith(f"{HEAD}.") for name in changes.tensors)
    if not changed or head.weight is not words.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def _replace_head(model: Any, weight: Tensor | None) -> Tensor | None:
    """Puts another weight into the head, if there is one; returns the one that was there."""
    before: Tensor = model.lm_head.weight.detach()
    if weight is None:
        return None
    model.lm_head.weight = nn.Parameter(weight.to(before.dtype))
    return before


@torch.no_grad()
def _add(model: Any, adapters: Adapters, sign: float) -> None:
    """Adds an adapter to the weights below it, or subtracts it, with one rounding."""
    for layer in adapters.complete:
        weight, change = model.get_submodule(layer).weight, adapters.change(layer)
        dense = change.up @ change.down
        weight.copy_(weight.double() + sign * (dense.T if adapters.layers[layer].transposed else dense))
    for layer in adapters.stacked:
        weight = model.get_parameter(adapters.weight_name(layer))
        weight.copy_(weight.double() + sign * torch.stack([own.up @ own.down for own in adapters.changes(layer)]))


def _check_headless(adapter: Adapter, read: Adapters) -> None:
    """What classifies has a head of its own, which is no pair of factors.

    Raises:
        InputError: The adapter has one.
    """
    if SCORE_WEIGHT in read.tensors:
        words = "which PEFT cannot combine: merge it alone"
        raise InputError(f"the adapter in {adapter.folder} has a head of classes, {words}")


def _own_head(adapter: Adapter, classifier: Any) -> Tensor | None:
    """Returns the base's head for tokens (V, D), as its run held it, which no classifier loads.

    None if it is tied to the embedding, or if the base has none, as a classifier's checkpoint.
    """
    if classifier.config.tie_word_embeddings:
        return None
    stored = CheckpointReader(adapter.model_path, empty_model(adapter.model_path), TYPES[adapter.dtype])
    return stored.parameter(HEAD_WEIGHT).detach().float() if stored.has(HEAD_WEIGHT) else None


@torch.no_grad()
def _sort(model: Any, weight: Tensor, names: Sequence[str]) -> None:
    """Gives a classifier the head (C, D) that an adapter trained, and its classes their names, where known."""
    model.score.weight = nn.Parameter(weight.to(model.score.weight.dtype))
    if len(names) == len(weight):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}


def _type_of(weights: Iterable[Tensor]) -> str:
    """The narrowest type that holds all weights without a rounding."""
    found = list(weights)
    for name, dtype in _NARROW.items():
        if all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in found):
            return name
    return "float32"


def _base_weights(model: Any, head: Tensor | None) -> Iterable[Tensor]:
    """The base's weights: those of the model as it was opened, but for a head of classes; and the head it lacks."""
    yield from (weight for name, weight in model.named_parameters() if name != SCORE_WEIGHT)
    if head is not None:
        yield head


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by name."""
    digests = {}
    for file in sorted(files):
        with open(file, "rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _are_as_merged(folder: Path, weights: Mapping[str, str]) -> bool:
    """Tells whether a merged model is still loaded from the files that were written, and from no others."""
    try:
        unchanged = _digests(folder / name for name in weights) == weights
        return unchanged and {file.name for file in find_tensors(folder).values()} == weights.keys()
    except (OSError, ValueError):
        return False


def _save(model: Any, source: Path, folder: Path) -> None:
    """Saves a model with the tokenizer of another one's folder.

    A classifier's `save_pretrained` writes no generation_config.json. The source's is kept for its end tokens.
    """
    model.save_pretrained(folder)
    files = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern)]
    if not (folder / GENERATION).exists():
        files.append(source / GENERATION)
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def merge(adapter: Adapter, out: Path, dtype: str = "fp32") -> int:
    """Writes the base model with an adapter added to its weights.

    Args:
        adapter: The adapter. One with a head of classes makes a classifier, `AutoModelForSequenceClassification`'s.
        out: The folder to write.
        dtype: The type of the weights; anything but fp32 rounds a part of the adapter away.

    Returns:
        The number of classes; 0 where the model is a causal LM.

    Raises:
        InputError: The base model is missing, or the adapter does not fit it or is no change of weights.
    """
    changes = read_fitting(adapter)
    _check_mergeable(adapter, changes)
    classes = classes_in(changes)
    base = open_held(adapter, dense=True, classes=classes).float()
    head = _own_head(adapter, base) if classes else None
    base_type = _type_of(_base_weights(base, head))
    shared = bool(changes.layers) and not classes and _untie(base, changes)
    if changes.layers:
        _add(base, changes, 1.0)
        head = head if classes else _replace_head(base, changes.tensors.get(HEAD_WEIGHT))
    else:
        base = merged(base, adapter)
    if classes:
        _sort(base, changes.tensors[SCORE_WEIGHT], adapter.classes)
    base.to(TYPES[dtype])
    _check_finite(base, dtype)

    def fill(draft: Path) -> None:
        _save(base, adapter.model_path, draft)
        copy_adapter(adapter, draft / MERGED)
        if head is not None and not shared:
            write_tensors(draft / MERGED / BASE_HEAD, {HEAD_WEIGHT: head})
        record = {"base": adapter.model, "base_type": base_type, "adapter": str(adapter.folder), "tied": shared}
        if classes:
            record |= {"classes": classes, "named": _named(adapter.model_path)}
        text = json.dumps({**record, "dtype": dtype, "weights": _digests({*find_tensors(draft).values()})}, indent=2)
        (draft / RECORD).write_text(text + "\n", encoding="utf-8")

    write_folder(out, fill)
    return classes


def _check_finite(model: Any, dtype: str) -> None:
    """Makes sure that merged weights are still numbers, which a narrow type may not hold.

    Raises:
        InputError: One is not.
    """
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"with the adapter added, {name} has values that are no finite numbers in {dtype}")


def _named(folder: Path) -> dict[str, Any]:
    """What a base's config.json says where a classifier's says something else."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: document[name] for name in _NAMED if name in document}


def _without_classes(config: Any, named: Mapping[str, Any]) -> None:
    """Gives a configuration back what `merge` wrote over."""
    config.pad_token_id = None
    config.num_labels = 0  # so that the next line makes the names anew
    config.num_labels = 2  # the library's default, which it does not write
    for name, value in named.items():
        setattr(config, name, value)


def read_record(folder: Path) -> dict[str, Any]:
    """What was merged into a folder.

    Raises:
        InputError: Nothing was, or its weights are no longer those that were written.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        weights, adapter = dict(record["weights"]), folder / MERGED
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no merged model: there is no {RECORD} that can be read in it") from None
    if not all((adapter / name).is_file() for name in ADAPTER_FILES):
        raise InputError(f"{folder} cannot be unmerged: its {MERGED} is gone")
    if not _are_as_merged(folder, weights):
        raise InputError(f"{folder} cannot be unmerged: its weights are not those that were merged")
    return record


def unmerge(folder: Path, out: Path) -> str:
    """Takes out of a merged model what was merged.

    Args:
        folder: The merged model's.
        out: The folder to write: the base model, to a rounding of its weights.

    Returns:
        The type of the weights written: the base's.

    Raises:
        InputError: Nothing was merged into it, or its weights have changed since.
    """
    record, adapter = read_record(folder), Adapter(folder / MERGED, str(folder), "fp32", MERGED)
    changes = read_fitting(adapter)
    if not changes.layers:
        more = f"its adapter does more than to add something to the weights ({more_than_factors(adapter)})"
        words = f"{more}; the base is {record['base']}"
        raise InputError(f"{folder} cannot be unmerged: {words}")
    model = load_unsplit(folder, torch.float32)  # a causal LM, as the base was
    _add(model, changes, -1.0)
    if record.get("tied"):
        model.lm_head.weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
    elif (folder / MERGED / BASE_HEAD).is_file():
        _replace_head(model, load_tensors(folder / MERGED / BASE_HEAD)[HEAD_WEIGHT])
    if record.get("classes"):
        _without_classes(model.config, record["named"])
    kind = str(record["base_type"]) if record["dtype"] == "fp32" else "float32"
    model.to(_NARROW.get(kind, torch.float32))
    write_folder(out, lambda draft: _save(model, folder, draft))
    return kind


def _check_linear(read: Sequence[Adapters]) -> None:
    """Factors can only be added where their shapes agree.

    Raises:
        InputError: They do not.
    """
    shapes = [{name: tensor.shape for name, tensor in adapters.tensors.items()} for adapters in read]
    for other in shapes[1:]:
        if other != shapes[0]:
            name = next(name for name in sorted({*shapes[0], *other}) if shapes[0].get(name) != other.get(name))
            raise InputError(f"linear needs adapters of the same ranks and layers; {name} differs: use cat or svd")


def combine(adapters: Sequence[Adapter], weights: Sequence[float], how: str, out: Path, rank: int | None = None) -> int:
    """Writes the weighted sum of adapters as one, by PEFT's `add_weighted_adapter`.

    Args:
        adapters: Two or more, of one base model.
        weights: What each counts.
        how: "cat" stacks them, which is exact; "svd" is the best fit of a rank; "linear" adds factor to factor,
            which is no sum of what they do.
        out: The folder to write.
        rank: Of "svd"; the largest of the adapters' where None.

    Returns:
        The largest rank of what was written.

    Raises:
        InputError: The adapters belong to different models, do not fit, or cannot be combined so.
    """
    check_same_base(adapters)
    read = [read_fitting(adapter) for adapter in adapters]
    for adapter, one in zip(adapters, read, strict=True):
        _check_headless(adapter, one)
        _check_mergeable(adapter, one)
        if not one.layers:
            words = f"it is no LoRA, whose factors add up, or more than that ({more_than_factors(adapter)})"
            raise InputError(f"{adapter.folder} cannot be combined: {words}")
        if HEAD_WEIGHT in one.tensors:
            raise InputError(f"the adapter in {adapter.folder} holds a whole head, which PEFT cannot combine")
    if how == "linear":
        _check_linear(read)
    if any(json.loads((one.folder / ADAPTER_FILES[0]).read_text()).get("target_parameters") for one in adapters):
        words = "nor on routers: PEFT adds up no such factors"
        raise InputError(f"adapters on the experts' stacked weights cannot be combined, {words}")
    base = open_base(adapters[0].model_path, adapters[0].dtype).float()
    names = [f"number{index}" for index in range(len(adapters))]
    model = PeftModel.from_pretrained(base, str(adapters[0].folder), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(adapter.folder), adapter_name=name)
    layers = {layer for one in read for layer in one.complete}
    _target_alike(list(model.peft_config.values()), layers)
    try:
        model.add_weighted_adapter(names, list(weights), "combined", combination_type=how, svd_rank=rank)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the adapters cannot be combined ({reason_of(error)})") from None
    tensors, ranks = _trimmed(get_peft_model_state_dict(model, adapter_name="combined"))
    if lost := sorted(layers ^ ranks.keys()):
        raise InputError(f"the adapters cannot be combined: PEFT leaves out {lost[0]}")
    largest = max(ranks.values())
    name, revision = to_peft(adapters[0].model)
    config = replace(
        model.peft_config["combined"],
        r=largest,
        lora_alpha=largest,  # a scaling of 1; PEFT forgets that another rule may scale
        use_rslora=False,
        rank_pattern={layer: own for layer, own in ranks.items() if own != largest},
        alpha_pattern={layer: own for layer, own in ranks.items() if own != largest},
        base_model_name_or_path=name,
        revision=revision,
        inference_mode=True,
        fan_in_fan_out=any(layer.transposed for layer in read[0].layers.values()),  # PEFT has that of the last layer
    )

    def fill(draft: Path) -> None:
        config.save_pretrained(str(draft))
        write_tensors(draft / ADAPTER_FILES[1], tensors)

    write_folder(out, fill)
    return largest


def _target_alike(configs: Sequence[Any], layers: Collection[str]) -> None:
    """Has adapters' configurations name the layers of all, where they do not choose theirs alike.

    PEFT lays out a sum by the first one's choice, and would leave out layers that only others have.
    """
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    choices = [[getattr(config, name) for name in fields] for config in configs]
    if all(choice == choices[0] for choice in choices):
        return
    for config in configs:
        config.target_modules = set(layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _trimmed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Factors without the zeros that PEFT fills up to the largest rank with, and their ranks by layer."""
    cut: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in tensors:
        prefix, found, _ = name.partition(".lora_A.")
        if not found:
            continue
        down, up = tensors[name], tensors[f"{prefix}.lora_B.weight"]
        used = (down != 0).any(1) | (up != 0).any(0)
        rank = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
        cut |= {name: down[:rank], f"{prefix}.lora_B.weight": up[:, :rank]}
        ranks[prefix.removeprefix("base_model.model.")] = rank
    return cut, ranks
