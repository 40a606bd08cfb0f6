"""An adapter's file, checked against its own configuration and its base model before any command uses it.

PEFT warns of a tensor that the file lacks, and says nothing of one that has no place. Both change what the model
computes. The check asks PEFT where each tensor belongs, on a model without weights, so that it costs no memory.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from fedsplit.adaptation import lora, prompts, run_adapters
from fedsplit.allowed import InputError, SettingError
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.parts import SCORE
from fedsplit.model.unsplit import empty_model, transposed_layers
from fedsplit.results.finished import ADAPTER_FILES, Adapter
from fedsplit.tensor_files import load_tensors
from fedsplit.updates import Adapters

PREFIX = "base_model.model."
"""The beginning of every name in a file that PEFT wrote."""

TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
"""PEFT's names of the tasks whose models are known here; None leaves it open."""


@dataclass(frozen=True)
class Placed:
    """Where PEFT puts the tensors of an adapter's file, on a model.

    Attributes:
        missing: Names of parameters that the configuration promises and the file does not set.
        unexpected: Names of tensors in the file that have no place.
    """

    missing: list[str]
    unexpected: list[str]


def read_adapter(adapter: Adapter) -> Adapters:
    """Reads an adapter, whose numbers must all be finite.

    Raises:
        InputError: It cannot be read, or holds NaN or infinite values.
    """
    try:
        read = run_adapters.load(adapter.folder)
    except Exception as error:  # noqa: BLE001  # whatever the libraries make of a broken file
        raise InputError(f"the adapter in {adapter.folder} cannot be read ({reason_of(error)})") from None
    for name, tensor in read.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the adapter in {adapter.folder} holds NaN or infinite values in {name}")
    return read


def read_fitting(adapter: Adapter) -> Adapters:
    """Reads an adapter, and makes sure that it is whole and fits its base model.

    Returns:
        Its tensors. Layers know by the model, not by the file, whether their weights are stored transposed: PEFT writes
        what it found at the last layer.

    Raises:
        InputError: It cannot be read; or it has a tensor without a place, lacks one that its configuration promises,
            or has one of another shape.
        SettingError: Its base model is not there.
    """
    read = read_adapter(adapter)
    path = adapter.about_path
    if prompts.kind_of(adapter.folder) is not None:
        _check_prompt(adapter, read, empty_model(path).config)
        return read
    model = empty_model(path, classes_in(read))
    transposed = transposed_layers(model)
    _check_placed(adapter, model, path, classes_in(read))
    layers = {
        name: replace(layer, transposed=name in transposed) if layer.parameter == "weight" else layer
        for name, layer in read.layers.items()
    }
    return replace(read, layers=layers)


def read_known(adapter: Adapter) -> tuple[Adapters, bool]:
    """Reads an adapter, and makes sure that it fits its base model where that is here.

    Returns:
        The adapter, and whether its model is here; without it only the file itself can be checked.

    Raises:
        InputError: As `read_fitting` does.
    """
    try:
        adapter.about_path  # noqa: B018  # looks for the model
    except SettingError:
        return read_adapter(adapter), False
    return read_fitting(adapter), True


def leaves_base(adapter: Adapter) -> bool:
    """Whether the base model is as it was when PEFT has taken an adapter off again.

    It is not where the file holds weights of the base, such as biases, which PEFT writes into it.
    """
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.peft_type != "LORA":
        return not getattr(config, "modules_to_save", None) or {*config.modules_to_save} <= {HEAD, SCORE}
    plain = [name for name in read_adapter(adapter).tensors if ".lora_" not in name or ".base_layer.weight" in name]
    neutral = config.init_lora_weights in lora.NEUTRAL_STARTS and not config.layer_replication
    return neutral and {*plain} <= {HEAD_WEIGHT, lora.SCORE_WEIGHT}


def more_than_factors(adapter: Adapter) -> str:
    """Names what an adapter does beside adding s * B @ A to layers; "" where it does nothing else."""
    config = PeftConfig.from_pretrained(str(adapter.folder))
    return lora.beyond_factors(config, read_adapter(adapter).tensors)


def classes_in(read: Adapters) -> int:
    """The classes that an adapter tells, of which it has a head (C, D); 0 where it predicts tokens."""
    return len(read.tensors[lora.SCORE_WEIGHT]) if lora.SCORE_WEIGHT in read.tensors else 0


def _check_prompt(adapter: Adapter, read: Adapters, model: Any) -> None:
    """Makes sure that virtual tokens or prefixes are as many, and as wide, as promised.

    Raises:
        InputError: They are not.
    """
    config, kind = PeftConfig.from_pretrained(str(adapter.folder)), prompts.kind_of(adapter.folder)
    assert kind is not None
    wanted = config.num_virtual_tokens, prompts.saved_width(kind, model)
    _check_names(adapter, {prompts.SAVED: wanted}, read.tensors)


def _check_placed(adapter: Adapter, model: Any, path: Path, classes: int) -> None:
    """Makes sure that each tensor has its place in a model, and each place its tensor.

    Args:
        adapter: The adapter.
        model: The model without weights.
        path: The model's folder.
        classes: Those that the adapter tells.

    Raises:
        InputError: It is not so, or PEFT cannot put such an adapter on such a model.
    """
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.task_type not in TASKS:
        words = f"it is made for the task {config.task_type}; allowed: CAUSAL_LM and SEQ_CLS"
        raise InputError(f"the adapter in {adapter.folder} does not fit the model: {words}")
    tensors = load_tensors(adapter.folder / ADAPTER_FILES[1])
    try:
        try:
            placed = _placed(config, tensors, model, "meta")
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            # A few kinds look at values as they start: they get a model with weights, though not with the right ones.
            filled = empty_model(path, classes).to_empty(device="cpu")
            for parameter in filled.parameters():
                parameter.data.normal_()
            placed = _placed(config, tensors, filled, "cpu")
    except Exception as error:  # noqa: BLE001  # whatever PEFT makes of a configuration that it did not write
        raise InputError(f"the adapter in {adapter.folder} does not fit the model ({reason_of(error)})") from None
    if placed.unexpected:
        words = f"it has {_listed(placed.unexpected)}, for which there is no place"
        raise InputError(f"the adapter in {adapter.folder} does not fit the model: {words}")
    if placed.missing:
        words = f"it lacks {_listed(placed.missing)}, which its {ADAPTER_FILES[0]} promises"
        raise InputError(f"the adapter in {adapter.folder} is not whole: {words}")


def _placed(config: Any, tensors: Mapping[str, Tensor], model: Any, device: str) -> Placed:
    """Puts an adapter on a model as PEFT does, and takes note of what was left over on either side."""
    config = copy.deepcopy(config)
    if config.peft_type == "LORA" and isinstance(config.init_lora_weights, str):
        config.init_lora_weights = False  # a start from the base's weights, which changes no name and no shape
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
        state = tuned.state_dict()
        saved = get_peft_model_state_dict(tuned, state_dict=state, save_embedding_layers=False)
        # PEFT renames what it saves, and keeps the tensors: by these the two kinds of names are matched.
        names = {id(tensor): name for name, tensor in saved.items()}
        promised = {name: names[id(tensor)] for name, tensor in state.items() if id(tensor) in names}
        trained = {name for name, _ in tuned.named_parameters(remove_duplicate=False)}
        promised = {name: plain for name, plain in promised.items() if name in trained}  # buffers are computed anew
        _check_shapes({plain: tuple(state[name].shape) for name, plain in promised.items()}, tensors)
        found = set_peft_model_state_dict(tuned, dict(tensors))
    missing = sorted({promised[name].removeprefix(PREFIX) for name in found.missing_keys if name in promised})
    return Placed(missing, sorted(name.removeprefix(PREFIX) for name in found.unexpected_keys))


def _check_shapes(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Makes sure that tensors have the shapes of their places.

    Raises:
        ValueError: One has not.
    """
    for name, tensor in tensors.items():
        if name in wanted and tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name.removeprefix(PREFIX)} is {tuple(tensor.shape)}, its place {wanted[name]}")


def _check_names(adapter: Adapter, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Makes sure that a file has certain tensors, and no others.

    Raises:
        InputError: It has not.
    """
    begin = f"the adapter in {adapter.folder}"
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise InputError(f"{begin} does not fit the model: it has {extra[0]}, for which there is no place")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise InputError(f"{begin} is not whole: it lacks {missing[0]}, which its {ADAPTER_FILES[0]} promises")
    try:
        _check_shapes(wanted, tensors)
    except ValueError as error:
        raise InputError(f"{begin} does not fit the model ({error})") from None


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def reason_of(error: Exception) -> str:
    """What a library says, as one short line."""
    if isinstance(error, KeyError):
        return f"it lacks {str(error.args[0]).removeprefix(PREFIX)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sizes = [line for line in lines if line.startswith("size mismatch")]
    line = (sizes or lines or [type(error).__name__])[0]
    return re.sub(r"torch\.Size\((\[[^]]*\])\)", r"\1", line).rstrip(".")
