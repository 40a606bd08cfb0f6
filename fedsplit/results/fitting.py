"""Checks an adapter's file against its configuration and its base model, before any command uses the adapter.

PEFT only warns of a missing tensor, and is silent about a tensor without a place in the model. Both change the output
of the model. The check asks PEFT for the place of each tensor, on a model without weights, which costs no memory.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from fedsplit.adaptation import adapter_files, lora, prompts, run_adapters
from fedsplit.errors import InputError, SettingError
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.parts import SCORE
from fedsplit.model.unsplit import empty_model, transposed_layers
from fedsplit.results.finished import ADAPTER_FILES, Adapter
from fedsplit.tensor_files import load_tensors
from fedsplit.updates import Adapters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "base_model.model."
"""Beginning of every tensor name in a file from PEFT."""

TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
"""PEFT's names of the supported tasks. None in a configuration leaves the task open."""


@dataclass(frozen=True)
class Placed:
    """The result of loading an adapter's file into a model by PEFT.

    Attributes:
        missing: Names of adapter parameters that the configuration creates and the file does not set.
        unexpected: Names of tensors in the file without a place in the model.
    """

    missing: list[str]
    unexpected: list[str]


def read_adapter(adapter: Adapter) -> Adapters:
    """Reads the tensors of an adapter.

    Raises:
        InputError: The file cannot be read, or holds NaN or infinite values.
    """
    try:
        adapters = run_adapters.load(adapter.folder)
    except Exception as error:  # noqa: BLE001  # a broken file can make the libraries raise any error
        raise InputError(f"the adapter in {adapter.folder} cannot be read ({reason_of(error)})") from None
    for name, tensor in adapters.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the adapter in {adapter.folder} holds NaN or infinite values in {name}")
    return adapters


def read_fitting(adapter: Adapter) -> Adapters:
    """Reads an adapter, and checks that the adapter is complete and fits the base model.

    Returns:
        The adapter's tensors and layers. `Layer.transposed` comes from the model, since PEFT writes a single value for
        all layers, the value of the last layer.

    Raises:
        InputError: The file cannot be read; or a tensor has no place in the model, is missing, or has a wrong shape.
        SettingError: The base model is missing.
    """
    adapters = read_adapter(adapter)
    path = adapter.about_path
    if prompts.kind_of(adapter.folder) is not None:
        _check_prompt(adapter, adapters, empty_model(path).config)
        return adapters

    classes = classes_in(adapters)
    model = empty_model(path, classes)
    transposed = transposed_layers(model)  # before PEFT changes the model in the check
    _check_placed(adapter, model, path, classes)

    layers = dict(adapters.layers)
    for name, layer in adapters.layers.items():
        if layer.parameter == "weight":
            layers[name] = replace(layer, transposed=name in transposed)
    return replace(adapters, layers=layers)


def read_known(adapter: Adapter) -> tuple[Adapters, bool]:
    """Reads an adapter. If the base model is on this machine, checks that the adapter fits the model.

    Returns:
        The adapter, and True if the base model is on this machine. Without the model, only the file is checked.

    Raises:
        InputError: As in `read_fitting`.
    """
    try:
        adapter.about_path  # noqa: B018  # the property looks for the model
    except SettingError:
        return read_adapter(adapter), False
    return read_fitting(adapter), True


def leaves_base(adapter: Adapter) -> bool:
    """Returns True if the base model is unchanged after PEFT has attached and detached an adapter.

    Some adapters hold weights of the base model, such as biases. PEFT writes such weights into the model for good.
    """
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.peft_type != "LORA":
        replaced = getattr(config, "modules_to_save", None) or ()
        return {*replaced} <= {HEAD, SCORE}
    base_weights = set()
    for name in read_adapter(adapter).tensors:
        if ".lora_" not in name or ".base_layer.weight" in name:
            base_weights.add(name)
    if config.layer_replication:  # PEFT repeats blocks of the base model
        return False
    # Starts such as PiSSA subtract the factors' first product from the base weights.
    keeps_base_at_start = config.init_lora_weights in adapter_files.NEUTRAL_STARTS
    # `results.whole.detach` puts the heads back.
    return keeps_base_at_start and base_weights <= {HEAD_WEIGHT, lora.SCORE_WEIGHT}


def more_than_factors(adapter: Adapter) -> str:
    """Describes an effect of an adapter beyond adding s * B @ A to layers, or returns "" without a further effect."""
    config = PeftConfig.from_pretrained(str(adapter.folder))
    return adapter_files.beyond_factors(config, read_adapter(adapter).tensors)


def classes_in(adapters: Adapters) -> int:
    """Returns the number of classes of an adapter's classification head (C, D), or 0 for token prediction.

    Example:
        >>> classes_in(Adapters({"score.weight": torch.zeros(3, 8)}, {}))
        3
    """
    head = adapters.tensors.get(lora.SCORE_WEIGHT)
    return 0 if head is None else len(head)


def _check_prompt(adapter: Adapter, adapters: Adapters, model_config: PretrainedConfig) -> None:
    """Checks the number and width of virtual tokens or prefixes against the configuration and the model.

    Raises:
        InputError: The file holds further tensors, or tensors of a wrong shape.
    """
    config = PeftConfig.from_pretrained(str(adapter.folder))
    kind = prompts.kind_of(adapter.folder)
    assert kind is not None
    shape = config.num_virtual_tokens, prompts.saved_width(kind, model_config)
    _check_names(adapter, {prompts.SAVED: shape}, adapters.tensors)


def _check_placed(adapter: Adapter, model: PreTrainedModel, path: Path, classes: int) -> None:
    """Checks that each tensor of an adapter's file has a place in the model, and that no tensor is missing.

    Args:
        adapter: The adapter.
        model: The base model without weights.
        path: Folder of the model.
        classes: Number of classes of the adapter's head; 0 if the adapter predicts tokens.

    Raises:
        InputError: A tensor has no place, or is missing; or PEFT cannot attach the adapter to the model.
    """
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.task_type not in TASKS:
        reason = f"it is made for the task {config.task_type}; allowed: CAUSAL_LM and SEQ_CLS"
        raise InputError(f"the adapter in {adapter.folder} does not fit the model: {reason}")
    tensors = load_tensors(adapter.folder / ADAPTER_FILES[1])
    try:
        placed = _placed_without_weights(config, tensors, model, path, classes)
    except Exception as error:  # noqa: BLE001  # a foreign configuration can make PEFT raise any error
        raise InputError(f"the adapter in {adapter.folder} does not fit the model ({reason_of(error)})") from None
    if placed.unexpected:
        reason = f"it has {_listed(placed.unexpected)}, for which there is no place"
        raise InputError(f"the adapter in {adapter.folder} does not fit the model: {reason}")
    if placed.missing:
        reason = f"it lacks {_listed(placed.missing)}, which its {ADAPTER_FILES[0]} promises"
        raise InputError(f"the adapter in {adapter.folder} is not whole: {reason}")


def _placed_without_weights(
    config: PeftConfig, tensors: Mapping[str, Tensor], model: PreTrainedModel, path: Path, classes: int
) -> Placed:
    """Loads an adapter's tensors into a model without weights.

    Args:
        config: PEFT configuration of the adapter.
        tensors: Content of the adapter's file.
        model: The base model without weights. PEFT changes the model.
        path: Folder of the model.
        classes: Number of classes of the adapter's head; 0 if the adapter predicts tokens.
    """
    try:
        return _placed(config, tensors, model, "meta")
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):  # torch's word for tensors without values
            raise
    # A few kinds of adapters compute with the base weights at the start. Random weights do for the check.
    # A new model, since the attempt above has changed the first one.
    random_model = empty_model(path, classes).to_empty(device="cpu")
    for parameter in random_model.parameters():
        parameter.data.normal_()
    return _placed(config, tensors, random_model, "cpu")


def _placed(
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    model: PreTrainedModel,
    device: str,
) -> Placed:
    """Loads an adapter's tensors into a model by PEFT.

    Args:
        config: PEFT configuration of the adapter.
        tensors: Content of the adapter's file.
        model: The model. PEFT changes the model.
        device: Device of the model.

    Returns:
        The names left over on either side.

    Raises:
        ValueError: A tensor has a wrong shape.
    """
    config = copy.deepcopy(config)  # PEFT writes into a configuration that it is given
    if config.peft_type == "LORA" and isinstance(config.init_lora_weights, str):
        # A start by name computes with the base weights, but has the names and shapes of the plain start.
        config.init_lora_weights = False
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
        state = tuned.state_dict()
        expected = _saved_names(tuned, state)
        shapes = {saved: tuple(state[name].shape) for name, saved in expected.items()}
        _check_shapes(shapes, tensors)
        result = set_peft_model_state_dict(tuned, dict(tensors))

    missing = {expected[name].removeprefix(PREFIX) for name in result.missing_keys if name in expected}
    unexpected = [name.removeprefix(PREFIX) for name in result.unexpected_keys]
    return Placed(sorted(missing), sorted(unexpected))


def _saved_names(tuned: PeftModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the name in an adapter's file for each parameter of an adapter, by the name in the model.

    Args:
        tuned: The model with the adapter.
        state: State of the model.
    """
    saved = get_peft_model_state_dict(tuned, state_dict=state, save_embedding_layers=False)
    # PEFT saves the same tensor objects under new names: match the two kinds of names by the objects.
    saved_names = {id(tensor): name for name, tensor in saved.items()}
    parameters = {name for name, _ in tuned.named_parameters(remove_duplicate=False)}
    names = {}
    for name, tensor in state.items():
        if id(tensor) in saved_names and name in parameters:  # buffers are computed, and not loaded
            names[name] = saved_names[id(tensor)]
    return names


def _check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Checks the shapes of tensors. Unexpected names are ignored.

    Raises:
        ValueError: A tensor has a wrong shape.
    """
    for name, tensor in tensors.items():
        if name in expected and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name.removeprefix(PREFIX)} is {tuple(tensor.shape)}, its place {expected[name]}")


def _check_names(adapter: Adapter, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Checks that a file holds exactly the expected tensors.

    Raises:
        InputError: A tensor is missing, unexpected, or of a wrong shape.
    """
    begin = f"the adapter in {adapter.folder}"
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise InputError(f"{begin} does not fit the model: it has {extra[0]}, for which there is no place")
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise InputError(f"{begin} is not whole: it lacks {missing[0]}, which its {ADAPTER_FILES[0]} promises")
    try:
        _check_shapes(expected, tensors)
    except ValueError as error:
        raise InputError(f"{begin} does not fit the model ({error})") from None


def _listed(names: Sequence[str]) -> str:
    """Returns the first name and the number of the others.

    Example:
        >>> _listed(["a"]), _listed(["a", "b", "c"])
        ('a', 'a and 2 more')
    """
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def reason_of(error: Exception) -> str:
    r"""Returns the message of a library's error as one short line.

    Example:
        >>> reason_of(RuntimeError("Error(s) in loading:\nsize mismatch for a: torch.Size([2, 3]) is not [4]."))
        'size mismatch for a: [2, 3] is not [4]'
    """
    if isinstance(error, KeyError):
        return f"it lacks {str(error.args[0]).removeprefix(PREFIX)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch lists the mismatches below a first line without any name.
    mismatches = [line for line in lines if line.startswith("size mismatch")]
    candidates = mismatches or lines or [type(error).__name__]
    return re.sub(r"torch\.Size\((\[[^]]*\])\)", r"\1", candidates[0]).rstrip(".")
