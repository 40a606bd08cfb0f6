"""The unsplit model after a run, for whoever may hold it: opened with an adapter, and measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fedsplit.adaptation import adapting, lora, prompts
from fedsplit.allowed import InputError, SettingError
from fedsplit.config import Config
from fedsplit.corpora.sequences import Sequences
from fedsplit.model.devices import CPU, TYPES, device_of
from fedsplit.model.families import read_facts, read_pad
from fedsplit.model.head import HEAD, WEIGHT
from fedsplit.model.kernels import IGNORED
from fedsplit.model.parts import SCORE
from fedsplit.model.quantization import check_quantization, is_quantized, was_transposed
from fedsplit.model.stored import check_checkpoint
from fedsplit.model.unsplit import load_whole, quantize_whole
from fedsplit.results.finished import Adapter
from fedsplit.scores import Score
from fedsplit.updates import Adapters


def open_base(model_path: Path, dtype: str, device: torch.device = CPU, classes: int = 0, seed: int = 0) -> Any:
    """The base model as a run held it.

    Args:
        model_path: Its folder.
        dtype: One of `fedsplit.allowed.DTYPES`.
        device: Where to.
        classes: Where above 0, a classifier of sequences with the head that the run began with.
        seed: The run's, of which that head follows.

    Raises:
        SettingError: The folder holds no model, or a broken one.
    """
    facts = read_facts(model_path)
    check_checkpoint(model_path, dtype, classes)
    base = load_whole(model_path, TYPES[dtype], classes, read_pad(model_path, facts.end)).eval()
    if classes:
        restore_head(base, seed)
    return base.to(device)


def restore_head(base: Any, seed: int) -> None:
    """Gives a classifier the head that a run of that seed began with."""
    head = base.get_submodule(SCORE)
    head.weight = torch.nn.Parameter(lora.fresh_score(head.weight.shape, lora.spread_of(base.config), seed))


def read_adapter(adapter: Adapter) -> Adapters:
    """Reads an adapter.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return adapting.load(adapter.folder)
    except Exception as error:  # noqa: BLE001  # whatever the libraries make of a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the adapter in {adapter.folder} cannot be read ({reason})") from None


def classes_in(read: Adapters) -> int:
    """The classes that an adapter tells, of which it has a head (C, D); 0 where it predicts tokens."""
    return len(read.tensors[lora.SCORE_WEIGHT]) if lora.SCORE_WEIGHT in read.tensors else 0


def check_same_head(adapters: Iterable[Adapter]) -> int:
    """Makes sure that one base model, opened with one head, takes all of some adapters.

    Returns:
        The number of classes that all tell; 0 where all predict tokens.

    Raises:
        InputError: They differ in it, or one cannot be read.
    """
    found = {adapter.folder: classes_in(read_adapter(adapter)) for adapter in adapters}
    (first, classes), *others = found.items()
    for folder, number in others:
        if number != classes:
            both = f"{first} {_tells(classes)}, {folder} {_tells(number)}"
            raise InputError(f"the adapters belong on models with different heads: {both}")
    return classes


def _tells(classes: int) -> str:
    return f"tells {classes} classes" if classes else "predicts tokens"


def open_held(
    adapter: Adapter, device: torch.device = CPU, dense: bool = False, classes: int = 0, seed: int = 0
) -> Any:
    """The base model as the run of an adapter held it; quantised where it was.

    Args:
        adapter: The adapter.
        device: Where to.
        dense: Whether quantised weights are decoded to the run's type, so that something can be added to them.
        classes: As in `open_base`.
        seed: As in `open_base`.

    Raises:
        SettingError: As in `open_base`; or the model has fewer blocks, or cannot be quantised here.
    """
    held = Config(cut=adapter.cut, quantization=adapter.quantization, dtype=adapter.dtype, device=str(device))
    if held.bits:
        if held.bounds[1] > read_facts(adapter.model_path).blocks:
            words = f"a model that can be cut as that of {adapter.folder} was, {adapter.cut}"
            raise SettingError("model", adapter.model, words)
        check_quantization(held)
    base = open_base(adapter.model_path, adapter.dtype, device, classes, seed)
    return quantize_whole(base, held.bounds, held.bits, device, dense) if held.bits else base


def read_fitting(adapter: Adapter, base: Any) -> Adapters:
    """Reads an adapter, and makes sure that it fits a model.

    Raises:
        InputError: It has a layer that the model has not, or one of another shape, or cannot be read.
    """
    read = read_adapter(adapter)
    modules = dict(base.named_modules())
    for layer in read.complete:
        change, facts = read.change(layer), read.layers[layer]
        wanted = change.shape[::-1] if facts.transposed else change.shape
        found = _shape(modules[layer]) if layer in modules else None
        if found != wanted:
            words = "which the model has not" if found is None else f"which is {found} in the model, not {wanted}"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: it changes {layer}, {words}")
    parameters = dict(base.named_parameters())
    for layer in read.stacked:
        name, changes = read.weight_name(layer), read.changes(layer)
        shape = len(changes), *changes[0].shape
        if name not in parameters or parameters[name].shape != shape:
            words = f"which is no {' x '.join(map(str, shape))} in the model"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: it changes {name}, {words}")
    for name in read.tensors.keys() - {prompts.SAVED, WEIGHT} if not read.layers else ():
        if _layer_of(name, modules) is None:
            words = f"it has {name}, of a layer which the model has not"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: {words}")
    _check_others(adapter, read, base)
    return read


def _layer_of(name: str, modules: Mapping[str, Any]) -> str | None:
    """The layer that an adapter's tensor belongs to: the longest beginning of its name that is one with a weight."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name if hasattr(modules[name], "weight") else None
    return None


def _check_others(adapter: Adapter, read: Adapters, base: Any) -> None:
    """Makes sure that what an adapter has beside LoRA fits a model.

    Raises:
        InputError: It does not.
    """
    pairs: list[tuple[str, object, object]] = []
    if WEIGHT in read.tensors:
        pairs.append((WEIGHT, tuple(read.tensors[WEIGHT].shape), tuple(base.lm_head.weight.shape)))
    if classes_in(read) and hasattr(base, SCORE):
        head = read.tensors[lora.SCORE_WEIGHT]
        pairs.append((lora.SCORE_WEIGHT, tuple(head.shape), tuple(base.score.weight.shape)))
    if (kind := prompts.kind_of(adapter.folder)) is not None:
        width = prompts.saved_width(kind, base.config)
        pairs.append((f"the width of its {prompts.SAVED}", read.tensors[prompts.SAVED].shape[1], width))
    for name, found, wanted in pairs:
        if found != wanted:
            words = f"{name} is {found}, the model's {wanted}"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: {words}")


def _shape(module: Any) -> tuple[int, ...]:
    """The shape of a projection's weight in the unsplit model; a quantised one tells nothing by its own."""
    if is_quantized(module):
        shape = module.out_features, module.in_features
        return shape[::-1] if was_transposed(module) else shape
    return tuple(module.weight.shape)


def attach(base: Any, adapter: Adapter) -> Any:
    """A base model with an adapter on it, by PEFT.

    Raises:
        InputError: The adapter does not fit.
    """
    read_fitting(adapter, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is drawn from a seed is not in the file, and need not be
        try:
            return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the adapter in {adapter.folder} does not fit the model ({reason})") from None


def merged(base: Any, adapter: Adapter) -> Any:
    """A base model with an adapter of any kind in its weights, by PEFT; the base is changed.

    Raises:
        InputError: The adapter does not fit, or cannot be merged.
    """
    model = attach(base, adapter)
    try:
        whole = model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the adapter in {adapter.folder} cannot be merged ({reason})") from None
    for name in (HEAD, SCORE):  # LN tuning leaves there what PEFT wrapped it in
        for trained in getattr(getattr(whole, name, None), "modules_to_save", {}).values():
            setattr(whole, name, trained)
    return whole


def detach(model: Any) -> Any:
    """The base model again, from what `attach` made of it."""
    base = model.get_base_model()
    if model.active_peft_config.is_prompt_learning:
        return base
    outer = {name: getattr(base, name) for name in (HEAD, SCORE) if hasattr(base, name)}  # a classifier has the second
    heads = {name: getattr(head, "original_module", head) for name, head in outer.items()}
    base = model.unload()
    for name, head in heads.items():
        if not hasattr(head, "base_layer"):  # PEFT leaves a head that was trained whole, or what it wrapped it in
            setattr(base, name, head)
    return base


@torch.no_grad()
def score(model: Any, batches: Iterable[Sequences]) -> Score:
    """Measures a causal LM, or a classifier of sequences.

    Args:
        model: The library's, with or without an adapter; computes in the type of its weights. A classifier's
            `pad_token_id` must be the token that fills up the sequences.
        batches: Sequences; every token that is predicted counts the same.
    """
    narrow, device = next(model.parameters()).dtype, device_of(model)
    total = Score()
    for rows in (batch.to(device) for batch in batches):
        seen = {} if rows.mask is None else {"attention_mask": rows.mask}
        with torch.autocast(device.type, narrow, enabled=narrow != torch.float32):
            logits = model(input_ids=rows.ids, **seen).logits
        labels = rows.labels
        if labels.ndim > 1:  # none is of virtual tokens
            logits, labels = logits[:, -labels.shape[1] : -1].flatten(0, 1), labels[:, 1:].flatten()
        wanted = labels != IGNORED
        if not bool(wanted.all()):
            logits, labels = logits[wanted], labels[wanted]
        nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
        total += Score(float(nats), labels.numel(), int((logits.argmax(-1) == labels).sum()))
    return total
