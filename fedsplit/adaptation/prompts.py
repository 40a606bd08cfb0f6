"""Virtual tokens and prefixes on a part, by PEFT's encoders; and what was trained as one adapter of the unsplit model.

Prompt tuning (2104.08691) and p-tuning (2103.10385) belong to the bottom: P virtual tokens are put before the embedded
text, and P + T positions cross. Of prefix tuning (2101.00190) every part has its share: past keys and values for the
attention of its own blocks. The text's positions begin behind them; nothing more crosses.

Shapes: B sequences, T tokens of text, P virtual tokens, D hidden, L blocks, H heads of keys and values, W their width.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from transformers import AutoConfig

from fedsplit.allowed import PARTS
from fedsplit.config import PromptSettings
from fedsplit.model.caches import PartCache
from fedsplit.model.devices import device_of
from fedsplit.model.parts import Bottom, Kind, Part, Top, Trunk
from fedsplit.model.sources import to_peft
from fedsplit.seeds import derive_seed
from fedsplit.updates import Adapters

SAVED = "prompt_embeddings"
"""What PEFT calls the one tensor of a file: virtual tokens (P, D), or past keys and values (P, L * 2 * H * W)."""

PEFT_TYPES = {"prompt": "PROMPT_TUNING", "ptuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
"""PEFT's names of the kinds, as in adapter_config.json."""

_PLACE, _NAME = "prompt_encoder", "default"
"""Where PEFT's models keep an encoder, and under which name."""

_STARTS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT"}
"""What prompt tuning starts from, by PEFT's names."""


class _Prompted(Bottom):
    """A bottom with virtual tokens before the text."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T) to hidden states (B, P + T, D); `mask` (B, P + T) is 0 on padding."""
        return self._decode(mask, inputs_embeds=self._embedded(ids))

    def extend(self, start: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """As of any part; the first tokens (B, T), on which nothing follows yet, make hidden states (B, P + T, D)."""
        return super().extend(start if cache.length else self._embedded(start), mask, positions, cache)

    def _embedded(self, ids: Tensor) -> Tensor:
        """Virtual tokens and embedded text, (B, P + T, D)."""
        embedded = getattr(self.decoder, self.family.embedding)(ids)
        tokens = self.get_submodule(f"{_PLACE}.{_NAME}")(torch.arange(self.virtual, device=ids.device)[None])
        tokens = tokens.repeat(ids.shape[0], 1, 1).to(embedded.dtype)
        return torch.cat([tokens, embedded], 1)


class _Prefixes(nn.ModuleDict):
    """What makes the past of a part's blocks: an encoder for each block, or with projection one for the part."""

    def __init__(self, encoders: Mapping[str, nn.Module], tokens: int, heads: int, width: int) -> None:
        """Takes over encoders in the order of their blocks.

        Args:
            encoders: By the number of the block in the unsplit model, or by the kind of the part.
            tokens: P.
            heads: H.
            width: W.
        """
        super().__init__(encoders)
        self.tokens, self._heads, self._width = tokens, heads, width

    def pairs(self, batch: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, P, W) of every block."""
        places = torch.arange(self.tokens, device=device).expand(batch, -1)
        found = []
        for encoder in self.values():
            flat = encoder(places).to(dtype).view(batch, self.tokens, -1, self._heads, self._width)
            found += [(pair[0], pair[1]) for pair in flat.permute(2, 0, 3, 1, 4).split(2)]
        return found


class _Prefixed(Part):
    """A part whose blocks attend to a past that was trained."""

    def past(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (rows, H, P, W) of each block."""
        prefixes: Any = self.get_submodule(f"{_PLACE}.{_NAME}")
        pairs: list[tuple[Tensor, Tensor]] = prefixes.pairs(rows, self.dtype, device_of(self))
        return pairs

    def _decode(self, mask: Tensor | None, **start: Any) -> Tensor:
        if "past_key_values" in start:  # a text that goes on, whose mask and past have the prefix already
            return super()._decode(mask, **start)
        rows = len(next(iter(start.values())))
        if mask is not None:
            mask = torch.cat([mask.new_ones(rows, self.ahead), mask], 1)
        return super()._decode(mask, **start, past_key_values=PartCache(self, rows))


class _PrefixedBottom(_Prefixed, Bottom):
    """A bottom with a past."""


class _PrefixedTrunk(_Prefixed, Trunk):
    """A trunk with a past."""


class _PrefixedTop(_Prefixed, Top):
    """A top with a past."""


_PREFIXED: Mapping[Kind, type[Part]] = {"bottom": _PrefixedBottom, "trunk": _PrefixedTrunk, "top": _PrefixedTop}


def _sizes(model: Any) -> tuple[int, int]:
    """H and W of a model, by its configuration."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    return heads, getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads


def saved_width(kind: str, model: Any) -> int:
    """The second dimension of what PEFT saves of a kind for a whole model, given its configuration."""
    heads, width = _sizes(model)
    return int(model.num_hidden_layers * 2 * heads * width if kind == "prefix" else model.hidden_size)


def peft_config(settings: PromptSettings, model: Any, layers: int | None = None, tokenizer: str = "") -> Any:
    """PEFT's configuration of our virtual tokens or prefixes.

    Args:
        settings: Which kind, and how.
        model: The configuration of the unsplit model, or of a part.
        layers: L; as many blocks as the configuration says where None.
        tokenizer: What reads the text that prompt tuning starts from.
    """
    facts: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings.tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.num_hidden_layers if layers is None else layers,
        "num_attention_heads": model.num_attention_heads,
        "token_dim": model.hidden_size,
    }
    if settings.kind == "prefix":
        heads, width = _sizes(model)
        facts |= {"num_attention_heads": heads, "token_dim": heads * width}
        return PrefixTuningConfig(
            **facts,
            encoder_hidden_size=settings.hidden or heads * width,
            prefix_projection=settings.projection,
            init_weights="zero" if settings.init == "zero" else None,
        )
    if settings.kind == "ptuning":
        return PromptEncoderConfig(
            **facts,
            encoder_reparameterization_type=settings.encoder.upper(),
            encoder_hidden_size=settings.hidden or model.hidden_size,
            encoder_num_layers=settings.layers,
            encoder_dropout=settings.dropout,
        )
    if settings.init == "text":
        facts |= {"prompt_tuning_init_text": settings.text, "tokenizer_name_or_path": tokenizer}
    return PromptTuningConfig(**facts, prompt_tuning_init=_STARTS[settings.init])


@contextlib.contextmanager
def _drawn(seed: int, what: str) -> Iterator[None]:
    """Draws what a module starts from out of the run's seed and a name, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, _PLACE, what))
        yield


def add(part: Part, settings: PromptSettings, seed: int, tokenizer: Path) -> None:
    """Gives a part its share of virtual tokens or prefixes, in place; its other parameters stay frozen.

    What they start from depends on the seed, and under `prefix` on the number of the block (with projection on the
    part), alone, so that it is the same for every client and, without projection, for every cut.

    Args:
        part: The part; its base weights must be frozen already.
        settings: Which kind, and how.
        seed: The run's seed.
        tokenizer: The folder of the tokenizer, for a text to start from.
    """
    device = device_of(part)
    part.virtual, part.ahead = settings.virtual, settings.positions - settings.virtual
    if settings.kind == "prefix":
        heads, width = _sizes(part.config)
        layers = {part.kind: len(part.blocks)} if settings.projection else {str(block): 1 for block in part.blocks}
        encoders = {}
        for name, count in layers.items():
            with _drawn(seed, name):
                if count:
                    encoders[str(name)] = PrefixEncoder(peft_config(settings, part.config, count))
        encoder: nn.Module = _Prefixes(encoders, settings.tokens, heads, width)
        part.__class__ = _PREFIXED[part.kind]
    elif part.kind == "bottom":
        config = peft_config(settings, part.config, tokenizer=str(tokenizer))
        with _drawn(seed, settings.kind):
            words = getattr(part.decoder, part.family.embedding)
            encoder = PromptEncoder(config) if settings.kind == "ptuning" else PromptEmbedding(config, words)
        part.__class__ = _Prompted
    else:
        return
    part.add_module(_PLACE, nn.ModuleDict({_NAME: encoder.to(device)}))
    part.adapter = frozenset(name for name, _ in part.named_parameters() if name.startswith(f"{_PLACE}."))


def _owner(name: str) -> str | None:
    """Whose an exported tensor is: the number of a block, the kind of a part, or None for virtual tokens."""
    found = re.match(rf"{_PLACE}\.(\d+|{'|'.join(PARTS)})\.", name)
    return found[1] if found else None


def of_part(tensors: Mapping[str, Tensor], kind: Kind, blocks: Collection[int]) -> dict[str, Tensor]:
    """Those of a part among some tensors by exported name."""
    owners = {str(kind), *map(str, blocks)}
    return {name: tensor for name, tensor in tensors.items() if (_owner(name) or "bottom") in owners}


@torch.no_grad()
def flattened(tensors: Mapping[str, Tensor], settings: PromptSettings, model: Any) -> Tensor:
    """What PEFT saves in place of an encoder: what it makes, (P, D) or (P, L * 2 * H * W).

    Args:
        tensors: By exported name, those of all parts or of one.
        settings: What they were made by.
        model: The configuration of the unsplit model.

    Returns:
        (0, D), or (P, 0), for a part that has none.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner = _owner(name)
        prefix = f"{_PLACE}." if owner is None else f"{_PLACE}.{owner}."
        groups.setdefault(owner or "0", {})[name.removeprefix(prefix)] = tensor
    if not groups:
        return torch.zeros(settings.tokens, 0) if settings.kind == "prefix" else torch.zeros(0, model.hidden_size)
    order = sorted(groups, key=lambda owner: PARTS.index(owner) if owner in PARTS else int(owner))
    made = [_make(groups[owner], settings, model) for owner in order]
    return torch.cat(made, 1).contiguous()


def embeddings(made: Tensor, settings: PromptSettings, model: Any) -> tuple[PromptSettings, dict[str, Tensor]]:
    """What encoders made, as embeddings that stand in for them: all that computing takes, nothing to train on from.

    Args:
        made: As `flattened` gives it, and PEFT saves it, of the unsplit model.
        settings: What it was made by.
        model: The configuration of the unsplit model, or of a part.

    Returns:
        The settings under which `add` gives parts room for them, and they themselves by exported name.
    """
    if settings.kind != "prefix":
        return PromptSettings(kind="prompt", tokens=len(made)), {f"{_PLACE}.embedding.weight": made}
    heads, width = _sizes(model)
    blocks = made.split(2 * heads * width, 1)
    named = {f"{_PLACE}.{block}.embedding.weight": pairs for block, pairs in enumerate(blocks)}
    return PromptSettings(kind="prefix", tokens=len(made)), named


def _make(tensors: Mapping[str, Tensor], settings: PromptSettings, model: Any) -> Tensor:
    """What one encoder makes, given its tensors."""
    if settings.kind == "prompt" or tensors.keys() == {"embedding.weight"}:
        return tensors["embedding.weight"]
    if settings.kind == "prefix":
        heads, width = _sizes(model)
        layers = tensors["transform.2.weight"].shape[0] // (2 * heads * width)
        encoder: nn.Module = PrefixEncoder(peft_config(settings, model, layers))
    else:
        encoder = PromptEncoder(peft_config(settings, model))
    encoder.load_state_dict(dict(tensors))
    made: Tensor = encoder.eval()(torch.arange(settings.tokens)[None])[0]
    return made


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    settings: PromptSettings,
    model_path: Path,
    base: str,
    blocks: Collection[int] | None = None,
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` opens on the unsplit model; encoders are not kept by PEFT.

    Args:
        directory: Where to; made if it is not there.
        tensors: By exported name, those of all parts or of one.
        settings: What they were made by.
        model_path: The base model's folder.
        base: The base model's name, for the record.
        blocks: The blocks whose tensors they are, where it is not all of them. Past keys and values of some blocks
            alone open on a model of as many blocks; of a part without virtual tokens, there are none.
    """
    model = AutoConfig.from_pretrained(model_path)
    made = flattened(tensors, settings, model)
    config = peft_config(settings, model, None if blocks is None else len(blocks), tokenizer=base)
    config.num_virtual_tokens = made.shape[0]
    config.base_model_name_or_path, config.revision = to_peft(base)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file({SAVED: made}, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> Adapters:
    """Reads an adapter of the unsplit model that `save`, or PEFT itself, wrote: one tensor, and no layer."""
    return Adapters(load_file(directory / "adapter_model.safetensors"), {})


def kind_of(directory: Path) -> str | None:
    """The kind of an adapter in a folder, as in `PEFT_TYPES`; None where it is neither virtual tokens nor prefixes."""
    found = PeftConfig.from_pretrained(str(directory)).peft_type
    return next((kind for kind, name in PEFT_TYPES.items() if name == found), None)
