"""Merges an adapter into its base model's weights, takes it out again, and combines several adapters.

A merged folder is an ordinary model. It also holds the merged adapter and a record, so that `unmerge` can subtract the
adapter. The sum is computed in float64 and rounded once to float32. So the restored weights differ from the base by one
rounding at most, and not at all if the base has a narrower type.

An adapter with a classification head makes a classifier of sequences, which has no head for tokens. The base's own head
for tokens is kept beside the adapter.
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
from fedsplit.durable import write_folder
from fedsplit.errors import InputError
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
"""File of a merged folder that records the merge."""

MERGED = "merged_adapter"
"""Subfolder of a merged folder with the adapter."""

BASE_HEAD = "base_head.safetensors"
"""File beside the merged adapter with the base's head, if the adapter replaced it and it was not tied."""

GENERATION = "generation_config.json"
"""File with a model's settings for generation; its end tokens take precedence over those of config.json."""

_NAMED = ("pad_token_id", "id2label", "label2id")
"""Keys of config.json in which a classifier differs from its base."""

_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types narrower than float32, by name."""


def _check_mergeable(adapter: Adapter, tensors: Adapters) -> None:
    """Checks that an adapter changes weights.

    Raises:
        InputError: The adapter consists of virtual tokens or prefixes.
    """
    if SAVED in tensors.tensors:
        reason = "virtual tokens or prefixes, which change no weight: there is nothing to add to the model's"
        raise InputError(f"the adapter in {adapter.folder} is made of {reason}")


def _untie(model: Any, changes: Adapters) -> bool:
    """Gives the head its own copy of a weight shared with the embedding, if an adapter changes the head.

    Returns:
        Whether the two were separated.
    """
    head = model.lm_head
    is_changed = any(name.startswith(f"{HEAD}.") for name in changes.tensors)
    is_tied = head.weight is model.get_input_embeddings().weight
    if not is_changed or not is_tied:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def _replace_head(model: Any, weight: Tensor | None) -> Tensor | None:
    """Replaces the head's weight, if a weight is given, and returns the previous weight."""
    before: Tensor = model.lm_head.weight.detach()
    if weight is None:
        return None
    model.lm_head.weight = nn.Parameter(weight.to(before.dtype))
    return before


@torch.no_grad()
def _add(model: Any, adapters: Adapters, sign: float) -> None:
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
        if adapters.layers[layer].transposed:
            dense = dense.T
        weight.copy_(weight.double() + sign * dense)
    for layer in adapters.stacked:
        weight = model.get_parameter(adapters.weight_name(layer))
        of_experts = [change.up @ change.down for change in adapters.changes(layer)]
        weight.copy_(weight.double() + sign * torch.stack(of_experts))


def _check_headless(adapter: Adapter, tensors: Adapters) -> None:
    """Checks that an adapter has no classification head, which is no pair of factors and so cannot be combined.

    Raises:
        InputError: The adapter has a classification head.
    """
    if SCORE_WEIGHT in tensors.tensors:
        reason = "which PEFT cannot combine: merge it alone"
        raise InputError(f"the adapter in {adapter.folder} has a head of classes, {reason}")


def _token_head(adapter: Adapter, classifier: Any) -> Tensor | None:
    """Returns the base's head for tokens (V, D), in the type of its run; a classifier does not load it.

    Returns None if the head is tied to the embedding, or if the checkpoint has none.
    """
    if classifier.config.tie_word_embeddings:
        return None
    stored = CheckpointReader(adapter.model_path, empty_model(adapter.model_path), TYPES[adapter.dtype])
    return stored.parameter(HEAD_WEIGHT).detach().float() if stored.has(HEAD_WEIGHT) else None


@torch.no_grad()
def _set_classifier(model: Any, weight: Tensor, names: Sequence[str]) -> None:
    """Gives a classifier the head (C, D) of an adapter, and the names of its classes if they are known."""
    model.score.weight = nn.Parameter(weight.to(model.score.weight.dtype))
    if len(names) == len(weight):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}


def _type_of(weights: Iterable[Tensor]) -> str:
    """Returns the name of the narrowest type that holds all weights without rounding."""
    all_weights = list(weights)
    for name, dtype in _NARROW.items():
        if all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in all_weights):
            return name
    return "float32"


def _base_weights(model: Any, head: Tensor | None) -> Iterable[Tensor]:
    """Yields the weights of the base: those of the opened model without a classification head, and the given head."""
    yield from (weight for name, weight in model.named_parameters() if name != SCORE_WEIGHT)
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
    """Tells whether a merged folder's weights are still those that were written.

    Args:
        folder: The merged folder.
        weights: sha256 of each file of weights when it was written.
    """
    try:
        unchanged = _digests(folder / name for name in weights) == weights
        return unchanged and {file.name for file in find_tensors(folder).values()} == weights.keys()
    except (OSError, ValueError):
        return False


def _save(model: Any, source: Path, folder: Path) -> None:
    """Saves a model, with the tokenizer of a source folder.

    A classifier's `save_pretrained` writes no generation_config.json. The source's is copied, for its end tokens.
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
        adapter: The adapter. With a classification head it makes a classifier, which
            `AutoModelForSequenceClassification` opens.
        out: Folder to write.
        dtype: Type of the weights; any but fp32 rounds a part of the change away.

    Returns:
        The number of classes; 0 for a causal LM.

    Raises:
        InputError: The base model is missing, or the adapter does not fit it or changes no weights.
    """
    changes = read_fitting(adapter)
    _check_mergeable(adapter, changes)
    classes = classes_in(changes)
    base = open_held(adapter, dense=True, classes=classes).float()
    base_head = _token_head(adapter, base) if classes else None
    base_type = _type_of(_base_weights(base, base_head))

    was_tied = bool(changes.layers) and not classes and _untie(base, changes)
    if not changes.layers:
        base = merged(base, adapter)
    else:
        _add(base, changes, 1.0)
        if not classes:
            base_head = _replace_head(base, changes.tensors.get(HEAD_WEIGHT))
    if classes:
        _set_classifier(base, changes.tensors[SCORE_WEIGHT], adapter.classes)
    base.to(TYPES[dtype])
    _check_finite(base, dtype)

    def fill(draft: Path) -> None:
        _save(base, adapter.model_path, draft)
        copy_adapter(adapter, draft / MERGED)
        if base_head is not None and not was_tied:
            write_tensors(draft / MERGED / BASE_HEAD, {HEAD_WEIGHT: base_head})
        record = {"base": adapter.model, "base_type": base_type, "adapter": str(adapter.folder), "tied": was_tied}
        if classes:
            record |= {"classes": classes, "named": _base_settings(adapter.model_path)}
        record |= {"dtype": dtype, "weights": _digests({*find_tensors(draft).values()})}
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write_folder(out, fill)
    return classes


def _check_finite(model: Any, dtype: str) -> None:
    """Checks that merged weights are finite: a narrow type can overflow.

    Raises:
        InputError: A weight has a value that is not finite.
    """
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"with the adapter added, {name} has values that are no finite numbers in {dtype}")


def _base_settings(folder: Path) -> dict[str, Any]:
    """Returns the keys of a base's config.json that `merge` overwrites for a classifier."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: document[name] for name in _NAMED if name in document}


def _without_classes(config: Any, named: Mapping[str, Any]) -> None:
    """Restores the keys of a configuration that `merge` overwrote for a classifier.

    Args:
        config: The classifier's configuration.
        named: The base's values of these keys.
    """
    config.pad_token_id = None
    config.num_labels = 0  # a change of the number makes transformers reset the names in the next line
    config.num_labels = 2  # the default of transformers, which it does not write to config.json
    for name, value in named.items():
        setattr(config, name, value)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of a merged folder.

    Raises:
        InputError: The folder holds no merged model, or its weights have changed since.
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
        The name of the type of the weights, which is that of the base.

    Raises:
        InputError: The folder holds no merged model, its weights have changed since, or its adapter does more than add
            to weights.
    """
    record = read_record(folder)
    adapter = Adapter(folder / MERGED, str(folder), "fp32", MERGED)
    changes = read_fitting(adapter)
    if not changes.layers:
        reason = f"its adapter does more than to add something to the weights ({more_than_factors(adapter)})"
        raise InputError(f"{folder} cannot be unmerged: {reason}; the base is {record['base']}")

    model = load_unsplit(folder, torch.float32)  # a causal LM, as the base was
    _add(model, changes, -1.0)
    if record.get("tied"):
        model.lm_head.weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
    elif (folder / MERGED / BASE_HEAD).is_file():
        _replace_head(model, load_tensors(folder / MERGED / BASE_HEAD)[HEAD_WEIGHT])
    if record.get("classes"):
        _without_classes(model.config, record["named"])

    # Weights that were merged in 16 bits have lost digits: what remains of the base needs float32.
    base_type = str(record["base_type"]) if record["dtype"] == "fp32" else "float32"
    model.to(_NARROW.get(base_type, torch.float32))
    write_folder(out, lambda draft: _save(model, folder, draft))
    return base_type


def _check_linear(all_adapters: Sequence[Adapters]) -> None:
    """Checks that adapters have factors of equal shapes, as "linear" needs.

    Raises:
        InputError: A shape differs, or a factor is in one adapter only.
    """
    shapes = [{name: tensor.shape for name, tensor in one.tensors.items()} for one in all_adapters]
    first, *others = shapes
    for other in others:
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise InputError(f"linear needs adapters of the same ranks and layers; {name} differs: use cat or svd")


def _check_combinable(adapter: Adapter, tensors: Adapters) -> None:
    """Checks that an adapter is a LoRA, whose factors PEFT can add up.

    Raises:
        InputError: The adapter is of another kind, or holds more than factors.
    """
    _check_headless(adapter, tensors)
    _check_mergeable(adapter, tensors)
    if not tensors.layers:
        reason = f"it is no LoRA, whose factors add up, or more than that ({more_than_factors(adapter)})"
        raise InputError(f"{adapter.folder} cannot be combined: {reason}")
    if HEAD_WEIGHT in tensors.tensors:
        raise InputError(f"the adapter in {adapter.folder} holds a whole head, which PEFT cannot combine")


def combine(adapters: Sequence[Adapter], weights: Sequence[float], how: str, out: Path, rank: int | None = None) -> int:
    """Writes the weighted sum of adapters as one adapter, by PEFT's `add_weighted_adapter`.

    Args:
        adapters: Two adapters or more, of one base model.
        weights: Weight of each adapter.
        how: "cat" stacks the factors, which is exact. "svd" is the best fit of a rank. "linear" adds factor to factor,
            which is not the sum of the changes.
        out: Folder to write.
        rank: Rank of "svd"; None for the largest rank of the adapters.

    Returns:
        The largest rank of the written adapter.

    Raises:
        InputError: The adapters belong to different models, do not fit, or cannot be combined this way.
    """
    check_same_base(adapters)
    all_tensors = [read_fitting(adapter) for adapter in adapters]
    for adapter, tensors in zip(adapters, all_tensors, strict=True):
        _check_combinable(adapter, tensors)
    if how == "linear":
        _check_linear(all_tensors)
    if any(json.loads((one.folder / ADAPTER_FILES[0]).read_text()).get("target_parameters") for one in adapters):
        reason = "nor on routers: PEFT adds up no such factors"
        raise InputError(f"adapters on the experts' stacked weights cannot be combined, {reason}")

    base = open_base(adapters[0].model_path, adapters[0].dtype).float()
    names = [f"number{index}" for index in range(len(adapters))]
    model = PeftModel.from_pretrained(base, str(adapters[0].folder), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(adapter.folder), adapter_name=name)
    layers = {layer for tensors in all_tensors for layer in tensors.complete}
    _target_alike(list(model.peft_config.values()), layers)
    try:
        model.add_weighted_adapter(names, list(weights), "combined", combination_type=how, svd_rank=rank)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the adapters cannot be combined ({reason_of(error)})") from None

    factors, ranks = _trimmed(get_peft_model_state_dict(model, adapter_name="combined"))
    if lost := sorted(layers ^ ranks.keys()):
        raise InputError(f"the adapters cannot be combined: PEFT leaves out {lost[0]}")
    largest = max(ranks.values())
    smaller = {layer: layer_rank for layer, layer_rank in ranks.items() if layer_rank != largest}
    name, revision = to_peft(adapters[0].model)
    config = replace(
        model.peft_config["combined"],
        r=largest,
        lora_alpha=largest,  # a scaling of 1 in every layer: PEFT has put the adapters' scalings into the factors
        use_rslora=False,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        base_model_name_or_path=name,
        revision=revision,
        inference_mode=True,
        # PEFT would write the answer of the last layer alone.
        fan_in_fan_out=any(layer.transposed for layer in all_tensors[0].layers.values()),
    )

    def fill(draft: Path) -> None:
        config.save_pretrained(str(draft))
        write_tensors(draft / ADAPTER_FILES[1], factors)

    write_folder(out, fill)
    return largest


def _target_alike(configs: Sequence[Any], layers: Collection[str]) -> None:
    """Makes all configurations target the layers of all adapters, unless they target the same layers already.

    PEFT builds the sum for the layers of the first configuration, and would leave out layers that only others have.
    """
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    choices = [[getattr(config, name) for name in fields] for config in configs]
    if all(choice == choices[0] for choice in choices):
        return
    for config in configs:
        config.target_modules = set(layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _trimmed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Cuts off the zeros with which PEFT pads factors to the largest rank.

    Returns:
        The factors by name, and the rank of each layer.
    """
    trimmed: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for a_name in tensors:
        layer, is_factor_a, _ = a_name.partition(".lora_A.")
        if not is_factor_a:
            continue
        b_name = f"{layer}.lora_B.weight"
        a = tensors[a_name]
        b = tensors[b_name]

        is_used = (a != 0).any(1) | (b != 0).any(0)
        rank = int(is_used.nonzero().max()) + 1 if bool(is_used.any()) else 1
        trimmed[a_name] = a[:rank]
        trimmed[b_name] = b[:, :rank]
        ranks[layer.removeprefix("base_model.model.")] = rank
    return trimmed, ranks
