"""Finds out where a model's embedding, blocks, norm and head are, from the library's class alone.

A miniature of the model runs once, and tells which modules compute before the first block and which after the last.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import SettingError, one_line
from fedsplit.model.block_layers import (
    is_balanced,
    narrows_of,
    norms_of,
    parameters_of,
    projections_of,
    router_of,
    targets_of,
    uncalled_of,
)
from fedsplit.model.families import Family
from fedsplit.model.library_head import LibraryHead, capped, without_extras
from fedsplit.model.miniature import VOCABULARY, identity_of, miniature

_ROWS, _TOKENS = 2, 12
"""Number and length of the texts with which a miniature runs."""

_LARGEST = 40_000_000
"""Largest number of parameters of a small model."""


_KNOWN: dict[str, Family] = {}
"""Records by configuration, so that each model is studied once in a process."""


class Underivable(Exception):
    """A model has another shape than a decoder that can be cut. The message is the reason."""


def whole_config(path: Path) -> PretrainedConfig:
    """Returns the configuration of a model, with all other models that are nested in it.

    Code that comes with a model is never run, and the library does not ask whether it may run.

    Args:
        path: Folder with config.json.

    Raises:
        Underivable: The library knows the model's type by such code only.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise Underivable("its type is defined by code that comes with it, and such code is not run") from None


def text_config(path: Path) -> PretrainedConfig:
    """Returns the configuration of a model's text decoder.

    A model of images and text has the text model nested in it. Only the text model is used.

    Args:
        path: Folder with config.json.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> text_config(BUNDLED_MODEL).model_type
        'gpt2'
    """
    config = whole_config(path)
    inner = config.get_text_config(decoder=True)
    if inner.model_type == config.model_type:  # an encoder with a decoder, whose sizes are those of the decoder
        return config
    if inner is not config and type(inner) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Underivable(f"its text model is of type {inner.model_type}, of which the library has no causal decoder")
    return inner


def family_of(config: PretrainedConfig) -> Family:
    """Returns the record of a model's type.

    Args:
        config: Configuration of the text decoder.

    Raises:
        SettingError: The model is no causal decoder, or has a shape that cannot be cut.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> family = family_of(text_config(BUNDLED_MODEL))
        >>> family.decoder, family.blocks, family.embedding, family.before, family.after
        ('transformer', 'h', 'wte', ('drop',), ('ln_f',))
        >>> family.targets
        ('c_attn', 'c_proj', 'c_fc')
    """
    _check_type(config)
    key = identity_of(config)
    try:
        if key not in _KNOWN:
            _KNOWN[key] = derive(config)
        return _KNOWN[key]
    except Underivable as error:
        kind = f"a model of type {config.model_type} ({error})"
        raise SettingError("model", kind, "a decoder with one list of blocks behind its embedding") from None


def _check_type(config: PretrainedConfig) -> None:
    """Refuses a type of model that is no causal decoder.

    Raises:
        SettingError: The library has no causal language model of the type.
    """
    model_type = config.model_type
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    has_encoder = model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_encoder and not has_encoder:
        return
    if has_encoder:
        kind = "which is an encoder with a decoder"
    elif is_encoder:
        kind = "which is an encoder: its tokens attend to later tokens"
    else:
        kind = "of which transformers has no causal language model"
    allowed = "a causal decoder, such as gpt2, llama, qwen3 or gemma3"
    raise SettingError("model", f"a model of type {model_type}, {kind}", allowed)


def derive(config: PretrainedConfig) -> Family:
    """Derives the record of a type by running a miniature.

    Args:
        config: Configuration of the text decoder.

    Raises:
        Underivable: The model has another shape.
        SettingError: No miniature of the model can be made.
    """
    if getattr(config, "hidden_size_per_layer_input", 0):
        words = "no cut will do: each of its blocks reads an embedding of the tokens, which the trunk must not see"
        raise Underivable(words)
    small = miniature(config)
    # The miniature draws random weights. Outside of this context, the generator of the process goes on as before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(small)
        names = _Names(model)
        trace = _Trace(model, names)
        biased_head = _has_biased_head(model)
        plain_head = not biased_head and _has_plain_head(model, names, _cap(small))

    decoder = model.get_submodule(names.decoder)
    blocks = [block for block in getattr(decoder, names.blocks)]
    router = router_of(model, blocks)
    parameters = parameters_of(blocks, router)
    targets, further = targets_of(blocks, parameters, trace.called)
    return Family(
        decoder=names.decoder,
        blocks=names.blocks,
        embedding=names.embedding,
        positions=tuple(trace.positions),
        before=tuple(trace.before),
        after=tuple(trace.after),
        targets=targets,
        further=further,
        uncalled=uncalled_of(blocks, trace.called),
        norms=norms_of(blocks),
        narrows=narrows_of(blocks, small.hidden_size),
        transposed=any(type(module) is Conv1D for block in blocks for module in block.modules()),
        head=names.head,
        cap=_cap(config),
        plain_head=plain_head,
        biased_head=biased_head,
        outgrows=_outgrows(config),
        router=router,
        balances=is_balanced(model),
        parameters=parameters,
    )


def build(small: PretrainedConfig) -> PreTrainedModel:
    """Returns a small random model in float32, in evaluation mode.

    Args:
        small: A result of `fedsplit.model.miniature.miniature`.

    Raises:
        Underivable: The library cannot build the model, or it is not small.
    """
    try:
        # First in outline, since a miniature that turns out large must not fill the memory.
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(small).num_parameters()
        if size > _LARGEST:
            raise Underivable(f"its small copy has {size / 1e6:.0f} million parameters")
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    except Underivable:
        raise
    except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
        raise Underivable(f"no small copy of it can be built: {one_line(error)}") from None


def _cap(config: PretrainedConfig) -> float | None:
    """Returns the soft cap on logits; None for no cap."""
    return getattr(config, "final_logit_softcapping", None)


def _outgrows(config: PretrainedConfig) -> str | None:
    """Returns the key for a length beyond which rotary positions change; None if none exists."""
    rotary = getattr(config, "rope_parameters", None) or {}
    key = "original_max_position_embeddings"
    changes = rotary.get("rope_type") in ("longrope", "dynamic")
    return key if changes and getattr(config, key, None) else None


class _Names:
    """Names of a model's main modules.

    Attributes:
        decoder: Name of the module that has the blocks, dotted if nested.
        blocks: Name of the list of blocks inside the decoder.
        embedding: Name of the token embedding inside the decoder.
        head: Name of the head inside the language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Finds the names.

        Raises:
            Underivable: The model has no or several lists of blocks, or its embedding or head are elsewhere.
        """
        depth = model.config.num_hidden_layers
        if depth < 1:
            raise Underivable("it has no blocks")
        lists = []
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                lists.append(name)
        # A block may have a list of the same length, such as its experts. A list inside another list is not the list
        # of blocks.
        outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if not outermost:
            raise Underivable(f"it has no list of {depth} blocks")
        embedding = _name_of(model, model.get_input_embeddings())
        owner = embedding.rpartition(".")[0]
        beside = [name for name in outermost if name.rpartition(".")[0] == owner]
        if len(beside) != 1:
            raise Underivable(f"its embedding {embedding} is not beside one list of blocks, {' or '.join(outermost)}")
        self.decoder, _, self.blocks = beside[0].rpartition(".")
        self.embedding = embedding.rpartition(".")[2]
        if not self.decoder:
            raise Underivable("its blocks lie in the language model itself")
        self.head = _name_of(model, model.get_output_embeddings())
        if not self.head or "." in self.head:
            raise Underivable(f"its head is {self.head or 'missing'}, and not a module of the language model itself")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """Returns the name of a module inside a model; an empty text if it is not inside."""
    return next((name for name, module in model.named_modules() if module is wanted), "")


class _Trace:
    """Course of a forward through a miniature's decoder.

    Attributes:
        positions: Names of modules that compute learned positions.
        before: Names of modules through which hidden states pass before the first block.
        after: Names of modules that compute after the last block, in their order.
        called: The projections that compute. A state-space model may read the weight of a projection itself, and would
            pass over an adapter.
    """

    def __init__(self, model: PreTrainedModel, names: _Names) -> None:
        """Runs the model once.

        Raises:
            Underivable: The model does not run, or runs its blocks in another order.
        """
        self.positions: list[str] = []
        self.before: list[str] = []
        self.after: list[str] = []
        self.called: set[nn.Module] = set()
        self._width = model.config.hidden_size
        decoder = model.get_submodule(names.decoder)
        blocks = list(getattr(decoder, names.blocks))
        self._entered: list[int] = []
        handles = []
        for number, block in enumerate(blocks):
            enter = functools.partial(self._enter, number)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            for _, projection in projections_of(block):
                handles.append(projection.register_forward_pre_hook(lambda module, _: self.called.add(module)))
        for name, module in decoder.named_children():
            if name not in (names.blocks, names.embedding):
                handles.append(module.register_forward_hook(functools.partial(self._hear, name, len(blocks))))
        ids = torch.arange(2, 2 + _ROWS * _TOKENS).reshape(_ROWS, _TOKENS) % VOCABULARY
        try:
            with torch.no_grad():
                model(input_ids=ids, **without_extras(model))
        except Underivable:
            raise
        except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
            raise Underivable(f"a small copy of it does not run: {one_line(error)}") from None
        finally:
            for handle in handles:
                handle.remove()
        if self._entered != list(range(len(blocks))):
            raise Underivable(f"its blocks are entered in the order {self._entered}")

    def _enter(
        self,
        number: int,
        _block: nn.Module,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        """Notes that a block begins to compute."""
        self._entered.append(number)
        hidden = inputs[0] if inputs else options.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.ndim != 3:
            raise Underivable(f"its blocks pass on hidden states of the shape {tuple(hidden.shape)}")

    def _hear(
        self,
        name: str,
        blocks: int,
        _module: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
    ) -> None:
        """Notes a module that has computed.

        Args:
            name: Name of the module inside the decoder.
            blocks: Number of blocks.
            inputs: Positional arguments of the module.
            output: Result of the module.
        """
        is_floating = isinstance(output, Tensor) and output.is_floating_point()
        is_wide = is_floating and output.shape[-1:] == (self._width,)
        if not is_wide and not self._is_hidden(output):  # rotary positions, which every part computes
            return
        if not self._entered and not (inputs and self._is_hidden(inputs[0])):
            self.positions.append(name)
        elif not self._entered:
            self.before.append(name)
        elif len(self._entered) == blocks:
            self.after.append(name)
        else:
            raise Underivable(f"its module {name} computes between the blocks")

    def _is_hidden(self, value: Any) -> bool:
        """Returns whether a value has the shape of hidden states (B, T, width), of any width."""
        return isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] == (_ROWS, _TOKENS)


def _has_biased_head(model: PreTrainedModel) -> bool:
    """Returns whether the head has a bias, which the fused loss does not add."""
    return getattr(model.get_output_embeddings(), "bias", None) is not None


def _has_plain_head(model: PreTrainedModel, names: _Names, cap: float | None) -> bool:
    """Returns whether logits are the head's output under the soft cap, and nothing else."""
    states = torch.randn(1, _TOKENS, model.get_output_embeddings().weight.shape[1])
    head = model.get_output_embeddings()
    with torch.no_grad():
        logits = LibraryHead(model, names.decoder, names.head)(states, head)
        # Equal to the bit: both ways make the same product, so any difference comes from a further operation.
        return torch.equal(logits, capped(head(states), cap))
