"""Virtual tokens and prefixes on a part, by PEFT's encoders, and their files.

Prompt tuning (2104.08691) and p-tuning (2103.10385) train in the bottom: P virtual tokens precede the embedded text,
and P + T positions are sent to the trunk. Prefix tuning (2101.00190) trains in every part: trained keys and values
precede the text's keys and values in the attention of the part's blocks. Nothing more is sent.

Shapes: B sequences, T tokens of text, P virtual tokens, D hidden, L blocks, H heads of keys and values, W their width.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    PeftConfig,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsplit.model.caches import PartCache
from fedsplit.model.devices import device_of
from fedsplit.model.facts import read_config
from fedsplit.model.parts import Bottom, Kind, Part, Top, Trunk
from fedsplit.model.sources import to_peft
from fedsplit.seeds import derive_seed
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.settings.sections import PromptSettings
from fedsplit.updates import Adapters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SAVED = "prompt_embeddings"
"""Name of the one tensor in a PEFT file: virtual tokens (P, D), or past keys and values (P, L * 2 * H * W)."""

PEFT_TYPES = {"prompt": "PROMPT_TUNING", "ptuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
"""PEFT's types in adapter_config.json, by the setting `prompt.kind`."""

_PLACE = "prompt_encoder"
"""Name of the module with the encoders, in PEFT's models."""

_NAME = "default"
"""Name of the encoder in the module."""

_STARTS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT"}
"""PEFT's names of the initial values of prompt tuning, by the setting `prompt.init`."""


class _Prompted(Bottom):
    """A bottom with virtual tokens before the text."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes hidden states (B, P + T, D) from tokens (B, T). `mask` (B, P + T) is 0 on padding."""
        return self._decode(mask, inputs_embeds=self._embedded(ids))

    def extend(
        self,
        start: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: PartCache,
    ) -> Tensor:
        """Continues sequences like any part. The first call returns hidden states (B, P + T, D) for tokens (B, T)."""
        # Only the first tokens follow the virtual tokens. The cache has the keys and values of the virtual tokens.
        is_first_call = cache.length == 0
        inputs = self._embedded(start) if is_first_call else start
        return super().extend(inputs, mask, positions, cache)

    def _embedded(self, ids: Tensor) -> Tensor:
        """Returns virtual tokens and embedded text (B, P + T, D)."""
        text = getattr(self.decoder, self.family.embedding)(ids)
        encoder = self.get_submodule(f"{_PLACE}.{_NAME}")
        numbers = torch.arange(self.virtual, device=ids.device)[None]
        tokens = encoder(numbers).repeat(ids.shape[0], 1, 1)
        return torch.cat([tokens.to(text.dtype), text], 1)


class _Prefixes(nn.ModuleDict):
    """Encoders of the trained past: an encoder for each block of a part, or with projection for the whole part."""

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        tokens: int,
        heads: int,
        width: int,
    ) -> None:
        """Stores the encoders.

        Args:
            encoders: Encoders in the order of their blocks, by the number of the block in the unsplit model; with
                projection, the part's encoder by the kind of the part.
            tokens: P.
            heads: H.
            width: W.
        """
        super().__init__(encoders)
        self.tokens = tokens
        self._heads = heads
        self._width = width

    def pairs(self, batch: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Returns keys and values (B, H, P, W) of every block."""
        places = torch.arange(self.tokens, device=device).expand(batch, -1)
        pairs = []
        for encoder in self.values():
            flat = encoder(places).to(dtype)
            pieces = flat.view(batch, self.tokens, -1, self._heads, self._width)
            by_block = pieces.permute(2, 0, 3, 1, 4)  # (2 L, B, H, P, W): keys and values of one block after another
            pairs += [(keys, values) for keys, values in by_block.split(2)]
        return pairs


class _Prefixed(Part):
    """A part whose blocks attend to a trained past."""

    def past(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Returns the trained keys and values (rows, H, P, W) of each block."""
        prefixes = self.get_submodule(f"{_PLACE}.{_NAME}")
        assert isinstance(prefixes, _Prefixes)
        return prefixes.pairs(rows, self.dtype, device_of(self))

    def _decode(self, mask: Tensor | None, **inputs: Any) -> Tensor:
        if "past_key_values" in inputs:  # in a call from `extend`, mask and cache contain the prefix already
            return super()._decode(mask, **inputs)
        rows = len(next(iter(inputs.values())))
        if mask is not None:  # every text may attend to the whole prefix
            mask = torch.cat([mask.new_ones(rows, self.ahead), mask], 1)
        return super()._decode(mask, **inputs, past_key_values=PartCache(self, rows))


class _PrefixedBottom(_Prefixed, Bottom):
    """A bottom with a past."""


class _PrefixedTrunk(_Prefixed, Trunk):
    """A trunk with a past."""


class _PrefixedTop(_Prefixed, Top):
    """A top with a past."""


_PREFIXED: Mapping[Kind, type[Part]] = {"bottom": _PrefixedBottom, "trunk": _PrefixedTrunk, "top": _PrefixedTop}


def _sizes(model: PretrainedConfig) -> tuple[int, int]:
    """Returns H and W of a model, given its configuration. Not every family has keys for both."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return heads, width


def saved_width(kind: str, model: PretrainedConfig) -> int:
    """Returns the second dimension of the tensor in a PEFT file.

    Args:
        kind: The setting `prompt.kind`.
        model: Configuration of the unsplit model.
    """
    if kind != "prefix":
        return int(model.hidden_size)
    heads, width = _sizes(model)
    return int(model.num_hidden_layers * 2 * heads * width)


def peft_config(
    settings: PromptSettings, model: PretrainedConfig, layers: int | None = None, tokenizer: str = ""
) -> PeftConfig:
    """Returns PEFT's configuration of virtual tokens or prefixes.

    Args:
        settings: Settings of the virtual tokens or prefixes.
        model: Configuration of the unsplit model, or of a part.
        layers: Number L of blocks; None for the number in the configuration.
        tokenizer: Folder of the tokenizer, for prompt tuning that starts from a text.
    """
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings.tokens,
        "num_transformer_submodules": 1,  # 2 is for an encoder beside the decoder
        "num_layers": model.num_hidden_layers if layers is None else layers,
        "num_attention_heads": model.num_attention_heads,
        "token_dim": model.hidden_size,
    }
    if settings.kind == "prefix":
        # Under grouped-query attention, keys and values have fewer heads than queries.
        heads, width = _sizes(model)
        fields |= {"num_attention_heads": heads, "token_dim": heads * width}
        return PrefixTuningConfig(
            **fields,
            encoder_hidden_size=settings.hidden or heads * width,
            prefix_projection=settings.projection,
            init_weights="zero" if settings.init == "zero" else None,
        )
    if settings.kind == "ptuning":
        return PromptEncoderConfig(
            **fields,
            encoder_reparameterization_type=settings.encoder.upper(),
            encoder_hidden_size=settings.hidden or model.hidden_size,
            encoder_num_layers=settings.layers,
            encoder_dropout=settings.dropout,
        )
    if settings.init == "text":
        fields |= {"prompt_tuning_init_text": settings.text, "tokenizer_name_or_path": tokenizer}
    return PromptTuningConfig(**fields, prompt_tuning_init=_STARTS[settings.init])


@contextlib.contextmanager
def _drawn(seed: int, what: str) -> Iterator[None]:
    """Seeds torch's generator inside the context by the run's seed and a name. Earlier draws do not matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, _PLACE, what))
        yield


def add(part: Part, settings: PromptSettings, seed: int, tokenizer: Path) -> None:
    """Adds a part's share of virtual tokens or prefixes, in place. All base weights stay frozen.

    The initial values depend only on the seed, and for `prefix` on the number of the block, or with projection on the
    part. So all clients have equal values, and without projection under every cut.

    Args:
        part: The part, with frozen base weights.
        settings: Settings of the virtual tokens or prefixes.
        seed: Seed of the run.
        tokenizer: Folder of the tokenizer, for virtual tokens that start from a text.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> from fedsplit.model.split import load_parts
        >>> (bottom,) = load_parts(BUNDLED_MODEL, (1, 5), ["bottom"])
        >>> add(bottom, PromptSettings(kind="prompt", tokens=4), seed=0, tokenizer=BUNDLED_MODEL)
        >>> bottom(torch.tensor([[3, 4, 5]])).shape  # four virtual tokens and three tokens of text
        torch.Size([1, 7, 128])
    """
    device = device_of(part)
    part.virtual = settings.virtual
    part.ahead = settings.positions - settings.virtual
    encoder: nn.Module
    if settings.kind == "prefix":
        encoder = _draw_prefixes(part, settings, seed)
        part.__class__ = _PREFIXED[part.kind]
    elif part.kind == "bottom":
        encoder = _draw_virtual_tokens(part, settings, seed, tokenizer)
        part.__class__ = _Prompted
    else:  # only the bottom has virtual tokens
        return
    part.add_module(_PLACE, nn.ModuleDict({_NAME: encoder.to(device)}))
    part.adapter = frozenset(name for name, _ in part.named_parameters() if name.startswith(f"{_PLACE}."))


def _draw_prefixes(part: Part, settings: PromptSettings, seed: int) -> _Prefixes:
    """Returns new encoders of a part's trained past. For the arguments see `add`."""
    heads, width = _sizes(part.config)
    blocks_by_encoder: dict[str, int] = {str(block): 1 for block in part.blocks}
    if settings.projection:  # the projection is one network for all blocks of the part
        blocks_by_encoder = {part.kind: len(part.blocks)}
    encoders = {}
    for name, count in blocks_by_encoder.items():
        with _drawn(seed, name):
            if count:  # a part may have no block
                encoders[name] = PrefixEncoder(peft_config(settings, part.config, count))
    return _Prefixes(encoders, settings.tokens, heads, width)


def _draw_virtual_tokens(part: Part, settings: PromptSettings, seed: int, tokenizer: Path) -> nn.Module:
    """Returns a new encoder of virtual tokens for a bottom. For the arguments see `add`."""
    config = peft_config(settings, part.config, tokenizer=str(tokenizer))
    with _drawn(seed, settings.kind):
        if settings.kind == "ptuning":
            return PromptEncoder(config)
        embedding = getattr(part.decoder, part.family.embedding)
        return PromptEmbedding(config, embedding)


def _owner(name: str) -> str | None:
    """Returns the owner of an exported tensor: number of a block or kind of a part; None for virtual tokens."""
    match = re.match(rf"{_PLACE}\.(\d+|{'|'.join(PARTS)})\.", name)
    return match[1] if match else None


def of_part(tensors: Mapping[str, Tensor], kind: Kind, blocks: Collection[int]) -> dict[str, Tensor]:
    """Selects the tensors of a part from tensors by exported name."""
    owners = {str(kind), *map(str, blocks)}
    return {name: tensor for name, tensor in tensors.items() if (_owner(name) or "bottom") in owners}


@torch.no_grad()
def flattened(tensors: Mapping[str, Tensor], settings: PromptSettings, model: PretrainedConfig) -> Tensor:
    """Computes the output of the encoders, (P, D) or (P, L * 2 * H * W). PEFT saves the output, not the encoders.

    Args:
        tensors: Tensors of all parts, or of one part, by exported name.
        settings: Settings of the virtual tokens or prefixes.
        model: Configuration of the unsplit model.

    Returns:
        The output; for a part without encoders an empty tensor, (0, D) or (P, 0).
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner = _owner(name)
        prefix = f"{_PLACE}." if owner is None else f"{_PLACE}.{owner}."
        groups.setdefault(owner or "0", {})[name.removeprefix(prefix)] = tensor  # virtual tokens have no owner
    if not groups:
        if settings.kind == "prefix":
            return torch.zeros(settings.tokens, 0)
        return torch.zeros(0, model.hidden_size)

    def place(owner: str) -> int:
        return PARTS.index(owner) if owner in PARTS else int(owner)

    outputs = [_encode(groups[owner], settings, model) for owner in sorted(groups, key=place)]  # in order of blocks
    return torch.cat(outputs, 1).contiguous()


def embeddings(
    output: Tensor, settings: PromptSettings, model: PretrainedConfig
) -> tuple[PromptSettings, dict[str, Tensor]]:
    """Converts the output of encoders to plain embeddings with an equal output, to replace the encoders.

    Args:
        output: Output of the encoders of the unsplit model, from `flattened` or from a file of PEFT.
        settings: Settings of the virtual tokens or prefixes.
        model: Configuration of the unsplit model, or of a part.

    Returns:
        Settings for `add` to create the embeddings, and the embeddings by exported name.
    """
    if settings.kind != "prefix":
        return PromptSettings(kind="prompt", tokens=len(output)), {f"{_PLACE}.embedding.weight": output}
    heads, width = _sizes(model)
    blocks = output.split(2 * heads * width, 1)
    named = {f"{_PLACE}.{block}.embedding.weight": pairs for block, pairs in enumerate(blocks)}
    return PromptSettings(kind="prefix", tokens=len(output)), named


def _encode(tensors: Mapping[str, Tensor], settings: PromptSettings, model: PretrainedConfig) -> Tensor:
    """Computes the output of an encoder from the encoder's tensors."""
    if settings.kind == "prompt" or tensors.keys() == {"embedding.weight"}:
        return tensors["embedding.weight"]
    if settings.kind == "prefix":
        heads, width = _sizes(model)
        layers = tensors["transform.2.weight"].shape[0] // (2 * heads * width)
        encoder: nn.Module = PrefixEncoder(peft_config(settings, model, layers))
    else:
        encoder = PromptEncoder(peft_config(settings, model))
    encoder.load_state_dict(dict(tensors))
    numbers = torch.arange(settings.tokens)[None]
    output: Tensor = encoder.eval()(numbers)[0]  # without the encoder's dropout
    return output


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    settings: PromptSettings,
    model_path: Path,
    base: str,
    blocks: Collection[int] | None = None,
    dtype: str = Config.dtype,
) -> None:
    """Writes an adapter for `PeftModel.from_pretrained` on the unsplit model.

    As in PEFT's files, the file has the output of the encoders, and not the encoders.

    Args:
        directory: Folder to write to. It is created if needed.
        tensors: Tensors of all parts, or of one part, by exported name.
        settings: Settings of the virtual tokens or prefixes.
        model_path: Folder of the base model.
        base: Name of the base model, in the form of the setting `model`.
        blocks: Numbers of the blocks of the tensors; None for all. A file with the prefixes of n blocks opens on a
            model of n blocks.
        dtype: Type of the run's base weights.
    """
    model = read_config(model_path)
    output = flattened(tensors, settings, model)
    config = peft_config(settings, model, None if blocks is None else len(blocks), tokenizer=base)
    config.num_virtual_tokens = output.shape[0]  # 0 for a part without encoders
    config.base_model_name_or_path, config.revision = to_peft(base, dtype)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file({SAVED: output}, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> Adapters:
    """Reads an adapter of the unsplit model, written by `save` or PEFT. The result has one tensor and no layers."""
    return Adapters(load_file(directory / "adapter_model.safetensors"), {})


def kind_of(directory: Path) -> str | None:
    """Returns the kind of an adapter in a folder, a key of `PEFT_TYPES`; None for adapters in the layers."""
    peft_type = PeftConfig.from_pretrained(str(directory)).peft_type
    return next((kind for kind, name in PEFT_TYPES.items() if name == peft_type), None)
