"""The unsplit model after a run, for whoever may hold it: opened with an adapter, and measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.allowed import InputError, SettingError
from fedsplit.config import Config
from fedsplit.corpora.sequences import Sequences
from fedsplit.model.checkpoint_reader import check_checkpoint
from fedsplit.model.devices import CPU, TYPES, device_of
from fedsplit.model.families import read_facts, read_pad
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.kernels import IGNORED
from fedsplit.model.parts import SCORE
from fedsplit.model.quantization import check_quantization
from fedsplit.model.unsplit import load_unsplit, quantize_unsplit
from fedsplit.results.finished import Adapter
from fedsplit.results.fitting import classes_in, read_fitting, reason_of
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
    base = load_unsplit(model_path, TYPES[dtype], classes, read_pad(model_path, facts.end)).eval()
    if classes:
        restore_head(base, seed)
    return base.to(device)


def restore_head(base: Any, seed: int) -> None:
    """Gives a classifier the head that a run of that seed began with."""
    head = base.get_submodule(SCORE)
    head.weight = torch.nn.Parameter(lora.fresh_score(head.weight.shape, lora.spread_of(base.config), seed))


def check_same_head(adapters: Mapping[Path, Adapters]) -> int:
    """Makes sure that one base model, opened with one head, takes all of some adapters.

    Args:
        adapters: Adapters' tensors by folder.

    Returns:
        The number of classes that all tell; 0 where all predict tokens.

    Raises:
        InputError: They differ in it.
    """
    found = {folder: classes_in(read) for folder, read in adapters.items()}
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
    return quantize_unsplit(base, held.bounds, held.bits, device, dense) if held.bits else base


def attach(base: Any, adapter: Adapter) -> Any:
    """A base model with an adapter on it, by PEFT.

    Raises:
        InputError: The adapter does not fit.
    """
    read_fitting(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is drawn from a seed is not in the file, and need not be
        try:
            return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
        except (RuntimeError, ValueError, TypeError, NotImplementedError, LookupError) as error:
            raise InputError(f"the adapter in {adapter.folder} does not fit the model ({reason_of(error)})") from None


def merged(base: Any, adapter: Adapter) -> Any:
    """A base model with an adapter of any kind in its weights, by PEFT; the base is changed.

    The sum is tried out: what PEFT cannot merge, it does not always refuse.

    Raises:
        InputError: The adapter does not fit, or cannot be merged.
    """
    names = {name for name, _ in base.named_parameters()}
    model = attach(base, adapter)
    begin = f"the adapter in {adapter.folder} cannot be merged"
    expected = _probe(model)
    tied = _untie(model.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are no longer tied
            whole = model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{begin} ({' '.join(str(error).split())})") from None
    for name, module in list(whole.named_modules()):  # LN tuning leaves modules in what PEFT wrapped them in
        for trained in getattr(module, "modules_to_save", {}).values():
            whole.set_submodule(name, trained)
    if tied:
        _tie_where_equal(whole)
    if strange := sorted({name for name, _ in whole.named_parameters()} - names - {HEAD_WEIGHT}):
        raise InputError(f"{begin}: PEFT leaves {strange[0]}, which is no weight of the model")
    if not _agree(_probe(whole), expected):
        raise InputError(f"{begin}: the model with it merged by PEFT does not compute what it does with it beside")
    return whole


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """What a model makes of a few tokens, among them those that come first in a vocabulary and last."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.cat([torch.arange(min(8, size)), torch.arange(max(0, size - 8), size)])[None]
    logits: Tensor = model(input_ids=ids.to(device_of(model))).logits
    return logits.float()


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same differ by roundings only."""
    largest = float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.0, atol=1e-3 * max(1.0, largest))


def _below(module: Any) -> Any:
    """The base model's own module, below whatever PEFT wrapped it in."""
    for name in ("base_layer", "original_module"):
        if hasattr(module, name):
            return _below(getattr(module, name))
    return module


def _untie(base: Any) -> bool:
    """Gives the head a copy of the embedding's weight where they share one, so that each is merged for itself.

    Returns:
        Whether they shared it.
    """
    words, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or _below(head).weight is not _below(words).weight:
        return False
    _below(head).weight = torch.nn.Parameter(_below(head).weight.detach().clone())
    return True


def _tie_where_equal(whole: Any) -> None:
    """Ties the head to the embedding again where an adapter left them equal; else config.json says they are not."""
    words, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    whole.config.tie_word_embeddings = torch.equal(words.weight, head.weight)
    if whole.config.tie_word_embeddings:
        head.weight = words.weight


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
