"""A causal language model to bottom, trunk and top.

A part is the model's own class with the other blocks cut away, so that masks, rotary positions
and windows stay the library's code. Each part reads only the tensors it owns from the checkpoint.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from fedsplit.config import SettingError
from fedsplit.model.devices import CPU
from fedsplit.model.families import Family, family_of
from fedsplit.model.kernels import causal_loss
from fedsplit.model.quantization import dequantized, quantized

Kind = Literal["bottom", "trunk", "top"]

SCORE = "score"
"""The name of the head of all the library's classifiers of sequences."""


class _NoPositions(nn.Module):
    """Stands where a part has no learned positions to add: the hidden states carry them already."""

    def forward(self, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros((), device=positions.device)


class Part(nn.Module):
    """A run of consecutive blocks of a causal LM, and what belongs before or after them.

    Submodules keep the names they have in the unsplit model; only the numbers of the blocks start at 0.

    Attributes:
        kind: "bottom", "trunk" or "top".
        family: The family's record.
        blocks: The numbers of its blocks in the unsplit model.
        config: The model's configuration, cut to this part.
        fused: Whether it computes with `fedsplit.model.kernels` where it can; else with the library's code alone.
        dtype: The type of its base weights and of its computation; adapters are float32 always.
        adapter: The parameters that are its adapter's, by their names here.
        virtual: Of a bottom, the virtual tokens before the text, as `fedsplit.adaptation.prompts` makes them.
    """

    adapter: frozenset[str] = frozenset()
    virtual: int = 0

    def __init__(self, kind: Kind, family: Family, blocks: range, whole: Any, fused: bool, dtype: torch.dtype) -> None:
        """Cuts a part out of a model.

        Args:
            kind: Which part.
            family: The family's record.
            blocks: The blocks to keep.
            whole: The library's causal LM, or classifier of sequences, on the meta device; taken apart by this.
            fused: Whether to compute with `fedsplit.model.kernels`.
            dtype: The type to compute in.
        """
        super().__init__()
        self.kind, self.family, self.blocks, self.config = kind, family, blocks, whole.config
        self.fused, self.dtype = fused, dtype
        decoder = whole.get_submodule(family.decoder)
        kept = getattr(decoder, family.blocks)[blocks.start : blocks.stop]
        setattr(decoder, family.blocks, nn.ModuleList(kept))
        self.config.num_hidden_layers = len(blocks)
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[blocks.start : blocks.stop]
        if kind != "bottom":
            setattr(decoder, family.embedding, nn.Identity())
            if family.positions:
                setattr(decoder, family.positions, _NoPositions())
            if family.dropout:
                setattr(decoder, family.dropout, nn.Identity())
        if kind != "top":
            setattr(decoder, family.norm, nn.Identity())
        elif hasattr(whole, "score"):
            self.score = whole.score
        else:
            self.lm_head = whole.lm_head
        outermost = family.decoder.partition(".")[0]
        setattr(self, outermost, getattr(whole, outermost))
        self.base_model_prefix = outermost  # PEFT takes a part for a model of the library's, which has this

    @property
    def decoder(self) -> Any:
        """The library's decoder, with this part's blocks."""
        return self.get_submodule(self.family.decoder)

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of its blocks with experts, in the order of the blocks."""
        inner, _, name = (self.family.router or "").partition(".")
        blocks = getattr(self.decoder, self.family.blocks) if inner else []
        return [router for block in blocks if (router := getattr(getattr(block, inner), name, None)) is not None]

    @property
    def experts(self) -> int:
        """Experts of each block that has any; 0 where the family has none."""
        return self.config.num_experts if self.family.router else 0

    def whole_name(self, name: str) -> str:
        """The name in the unsplit model of a submodule or parameter of this part."""
        prefix = f"{self.family.decoder}.{self.family.blocks}."
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(number) + self.blocks.start}{dot}{rest}"

    def _computing(self, device: torch.device) -> torch.autocast:
        """Products of float32 adapters with narrower hidden states are made in the narrower type."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _decode(self, mask: Tensor | None, **start: Any) -> Tensor:
        with self._computing(next(iter(start.values())).device):
            return self.decoder(attention_mask=mask, **{"use_cache": False, **start}).last_hidden_state

    def extend(self, start: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """What follows on positions whose keys and values are known; see `fedsplit.model.caches`.

        Args:
            start: New tokens (B, T) of a bottom, new hidden states (B, T, D) of another part.
            mask: (B, all positions so far and the new ones), 0 on padding; None where there is none.
            positions: Of the new tokens in their sequences, (B, T) or (1, T).
            cache: The library's, of this part's blocks; grows.

        Returns:
            Hidden states (B, T, D); of a top, those that its head reads.
        """
        name = "input_ids" if self.kind == "bottom" else "inputs_embeds"
        how = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self._decode(mask, **{name: start}, **how)


class Bottom(Part):
    """The embedding and the first blocks; at the client."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T) to hidden states (B, T, D); `mask` (B, T) is 0 on padding."""
        return self._decode(mask, input_ids=ids)


class Trunk(Part):
    """The blocks in the middle; at the server."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to hidden states (B, T, D)."""
        return self._decode(mask, inputs_embeds=hidden)


class Top(Part):
    """The last blocks, the final norm and the head; at the client."""

    def logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to logits (B, T, V)."""
        with self._computing(hidden.device):
            return self.predict(self._decode(mask, inputs_embeds=hidden))

    def predict(self, hidden: Tensor) -> Tensor:
        """What the head makes of the last block's hidden states (B, T, D): logits (B, T, V)."""
        with self._computing(hidden.device):
            logits = self.lm_head(hidden)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @property
    def cap(self) -> float | None:
        """What no logit exceeds, where the family caps them softly."""
        return getattr(self.config, self.family.cap_key) if self.family.cap_key else None

    @property
    def classifies(self) -> bool:
        """Whether its head tells the classes of sequences, and not the next token."""
        return hasattr(self, "score")

    def scores(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to logits of classes (B, C), by the last token that is no padding."""
        with self._computing(hidden.device):
            logits = self.score(self._decode(mask, inputs_embeds=hidden))
        last = hidden.shape[1] - 1 if mask is None else mask.long().sum(1) - 1
        return logits[torch.arange(len(hidden), device=hidden.device), last]

    def forward(self, hidden: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) and labels (B, T) to the mean next-token loss in nats, a scalar.

        Labels are the tokens themselves, -100 where no loss is wanted; they are shifted here. Of a part that classifies
        they are classes (B,), and the loss is that of the sequences; padding must be at the right.
        """
        if self.classifies:
            return functional.cross_entropy(self.scores(hidden, mask).float(), labels)
        head = self.lm_head
        if self.fused and hasattr(head, "causal_loss"):  # a head that learns
            return head.causal_loss(self._decode(mask, inputs_embeds=hidden), labels, self.cap)
        bare = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        if self.fused and bare:
            return causal_loss(self._decode(mask, inputs_embeds=hidden), head.weight, labels, self.cap)
        return ForCausalLMLoss(self.logits(hidden, mask), labels, head.out_features)


PARTS: dict[Kind, type[Part]] = {"bottom": Bottom, "trunk": Trunk, "top": Top}


_AT_ONCE = 32 * 2**20
"""Bytes of a tensor that are cast at a time."""


class _Checkpoint:
    """Reads single tensors of a checkpoint in safetensors, sharded or not.

    A tensor that is read twice (an embedding tied to the head) is kept once. Experts that are stored one by one are
    put together as the library has them.
    """

    def __init__(self, path: Path, family: Family, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._family, self._dtype, self._device = family, dtype, device
        self._prefix = f"{family.decoder.partition('.')[0]}."
        index = path / "model.safetensors.index.json"
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: path / file for name, file in weight_map.items()}
        else:
            self._files = {name: file for file in sorted(path.glob("*.safetensors")) for name in _names(file)}
        self._kept: dict[str, nn.Parameter] = {}

    def _known(self, pattern: str) -> str | None:
        candidates = (pattern, pattern.removeprefix(self._prefix))
        return next((found for found in candidates if found.replace("*", "0") in self._files), None)

    def _find(self, name: str, tied_to: str) -> list[str]:
        """The names of a parameter's pieces in the files; with `*` for the number of the expert."""
        options = [[name], [tied_to]]
        for end, pieces in self._family.stored.items():
            if name.endswith(end):
                options.insert(1, [name.removesuffix(end) + piece for piece in pieces])
        for option in options:
            found = [known for piece in option if (known := self._known(piece))]
            if len(found) == len(option):
                return found
        raise ValueError(f"the checkpoint has no tensor {name}")

    def _experts(self, pattern: str) -> list[str]:
        numbered = (pattern.replace("*", str(number)) for number in itertools.count())
        return list(itertools.takewhile(self._files.__contains__, numbered))

    def _shape(self, pattern: str) -> list[int]:
        if "*" in pattern:
            names = self._experts(pattern)
            return [len(names), *self._shape(names[0])]
        with safe_open(self._files[pattern], framework="pt") as file:
            return list(file.get_slice(pattern).get_shape())

    def _mapped(self, name: str) -> Tensor | None:
        """A tensor as it lies in the file, whose pages processes share; None where it is of another type."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor if tensor.dtype == self._dtype else None

    def _fill(self, pattern: str, place: Tensor) -> None:
        """Reads a tensor into its place, some rows at a time: no more of it is there twice while it is cast."""
        if "*" in pattern:
            for row, name in zip(place, self._experts(pattern), strict=True):
                self._fill(name, row)
            return
        rows = max(1, _AT_ONCE * len(place) // max(1, place.nbytes))
        for begin in range(0, len(place), rows):
            # Opened anew each time: what was read of a file stays resident until it is closed.
            with safe_open(self._files[pattern], framework="pt") as file:
                place[begin : begin + rows] = file.get_slice(pattern)[begin : begin + rows]

    def shape(self, name: str, tied_to: str) -> list[int]:
        """The shape of a tensor, from the files' headers."""
        shape, *others = [self._shape(piece) for piece in self._find(name, tied_to)]
        for other in others:
            if shape[0] != other[0]:
                raise ValueError(f"{name} has pieces of {shape[0]} and {other[0]} experts")
            shape[-2] += other[-2]
        return shape

    def parameter(self, name: str, tied_to: str) -> nn.Parameter:
        """The frozen parameter of that name; the one it is tied to where the file has no such name."""
        first, *others = pieces = self._find(name, tied_to)
        if first not in self._kept:
            tensor = self._mapped(first) if not others and "*" not in first else None
            if tensor is None:
                tensor = torch.empty(self.shape(name, tied_to), dtype=self._dtype)
                sizes = [self._shape(piece)[-2] for piece in pieces] if others else []
                places = tensor.split(sizes, -2) if others else [tensor]
                for piece, place in zip(pieces, places, strict=True):
                    self._fill(piece, place)
            self._kept[first] = nn.Parameter(tensor.to(self._device), requires_grad=False)
        return self._kept[first]

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps some parameters no longer, for others that are tied to them."""
        gone = {id(parameter) for parameter in parameters}
        self._kept = {name: kept for name, kept in self._kept.items() if id(kept) not in gone}


def _names(file: Path) -> Iterable[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def check_checkpoint(path: Path) -> None:
    """Makes sure that a checkpoint's files can be read; looks at their headers only.

    Raises:
        SettingError: A file is missing or cut short, or a tensor is not what config.json says.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        family = family_of(config.model_type)
        checkpoint = _Checkpoint(path, family, torch.float32)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
        for name, parameter in whole.named_parameters():
            if (found := checkpoint.shape(name, _tied(name, family))) != list(parameter.shape):
                raise ValueError(f"{name} has the shape {found}, config.json says {list(parameter.shape)}")
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the library makes of an impossible configuration
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        words = "a folder whose config.json and *.safetensors are whole and belong together"
        raise SettingError("model", f"{path} ({reason})", words) from None


def _tied(name: str, family: Family) -> str:
    """The parameter that one may share its values with, where a checkpoint has it only once."""
    return f"{family.decoder}.{family.embedding}.weight" if name == "lm_head.weight" else name


def ranges(blocks: int, bounds: tuple[int, int]) -> dict[Kind, range]:
    """Which blocks each part has.

    Args:
        blocks: Number of blocks of the model.
        bounds: The trunk is the blocks from the first number to below the second.
    """
    low, high = bounds
    return {"bottom": range(low), "trunk": range(low, high), "top": range(high, blocks)}


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **how: Any) -> Any:
    """The library's attention, on a CPU in float32 always: torch's backward of a narrower one takes twice as long."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, *rest, **how)
    with torch.autocast("cpu", enabled=False):
        output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *rest, **how)
    return output.to(query.dtype), weights


_WIDE = "fedsplit_wide"
AttentionInterface.register(_WIDE, _attention)
AttentionMaskInterface.register(_WIDE, sdpa_mask)


def _quicken(config: Any) -> None:
    """Chooses torch's own functions for what the library spells out."""
    for key in ("activation_function", "hidden_act"):
        if getattr(config, key, None) == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")


def _widen(config: Any, dtype: torch.dtype) -> None:
    """Chooses the type that torch's attention is fastest in; a family without it keeps the library's choice."""
    if dtype != torch.float32 and config._attn_implementation == "sdpa":
        config._attn_implementation = _WIDE


def _restore_scale(decoder: Any, embedding: nn.Module, device: torch.device) -> None:
    """Gives an embedding that scales what it looks up its factor, which no checkpoint has; the library knows it."""
    for name, buffer in list(embedding.named_buffers()):
        setattr(embedding, name, nn.Buffer(torch.empty_like(buffer, device=device), persistent=False))
    decoder._init_weights(embedding)


def load_parts(
    path: Path,
    bounds: tuple[int, int],
    kinds: Sequence[Kind],
    dtype: torch.dtype = torch.float32,
    kernels: str = "library",
    classes: int = 0,
    device: torch.device = CPU,
    bits: Mapping[str, int] | None = None,
) -> list[Any]:
    """Loads some parts of a model; of the checkpoint, nothing else is read.

    All base weights are frozen. Parts loaded together share tensors that are tied.

    Args:
        path: A folder with config.json and safetensors.
        bounds: The cut as (LO, HI).
        kinds: The parts to load.
        dtype: The type of the weights, whatever type they are stored in, and of computation.
        kernels: "fused" computes with `fedsplit.model.kernels`, which is the same to rounding; "library" with the
            library's code alone, which is the unsplit model to the bit.
        classes: Where above 0, the top gets a new head, `score`, that tells so many classes of sequences. It has no
            values yet: `fedsplit.adaptation.lora.add` draws them.
        device: Where the parts are put.
        bits: By part, 4 or 8 bits in which its blocks keep their base weights; in `dtype` where it is left out.

    Returns:
        The parts, in the order of `kinds`, in evaluation mode.

    Raises:
        ValueError: The checkpoint lacks a tensor, or the cut lies outside the model.
    """
    config, fused = AutoConfig.from_pretrained(path), kernels == "fused"
    family = family_of(config.model_type)
    if not 0 <= bounds[0] < bounds[1] <= config.num_hidden_layers:
        raise ValueError(f"cut {bounds} lies outside a model of {config.num_hidden_layers} blocks")
    pieces = ranges(config.num_hidden_layers, bounds)
    checkpoint = _Checkpoint(path, family, dtype, device)
    parts = []
    for kind in kinds:
        config = AutoConfig.from_pretrained(path)
        if fused:
            _quicken(config)
        sorts = kind == "top" and classes > 0
        if sorts:
            config.num_labels = classes
        made_by = AutoModelForSequenceClassification if sorts else AutoModelForCausalLM
        with torch.device("meta"):
            whole = made_by.from_config(config, dtype=dtype)
        if fused:
            _widen(whole.config, dtype)
        part = PARTS[kind](kind, family, pieces[kind], whole, fused, dtype)
        decoder = part.decoder
        if kind == "bottom":
            _restore_scale(decoder, getattr(decoder, family.embedding), device)
        for module_name, module in list(part.named_modules()):
            for name, old in list(module.named_parameters(recurse=False)):
                if sorts and module_name == SCORE:
                    setattr(module, name, nn.Parameter(torch.empty(old.shape, device=device)))
                    continue
                full = part.whole_name(f"{module_name}.{name}")
                setattr(module, name, checkpoint.parameter(full, _tied(full, family)))
            if bits and kind in bits and _is_projection(part, module_name, module):
                part.set_submodule(module_name, quantized(module, bits[kind], dtype, device))
                checkpoint.forget(module.parameters())
                module.weight = None
        if family.rotary:
            setattr(decoder, family.rotary, type(getattr(decoder, family.rotary))(config=part.config).to(device))
        parts.append(_announced(part.eval(), [bits[kind]] if bits and kind in bits else []))
    return parts


def _is_projection(part: Part, name: str, module: nn.Module) -> bool:
    """Whether a module is a projection inside a block."""
    blocks = f"{part.family.decoder}.{part.family.blocks}."
    return name.startswith(blocks) and type(module) in (nn.Linear, Conv1D)


def _announced(model: Any, bits: Iterable[int]) -> Any:
    """A model that says what is quantised in it, as PEFT asks."""
    for number in bits:
        setattr(model, f"is_loaded_in_{number}bit", True)
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that lies beside a model."""
    return AutoTokenizer.from_pretrained(path)


def blank(path: Path) -> Any:
    """The unsplit model without its weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def load_whole(path: Path, dtype: torch.dtype = torch.float32, classes: int = 0, pad: int | None = None) -> Any:
    """The unsplit model, for whoever may hold it: the reference in tests, the user after a run.

    Args:
        path: A folder with config.json and safetensors.
        dtype: The type of the weights.
        classes: Where above 0, a classifier of sequences whose head has random values.
        pad: Of a classifier, the token that fills up shorter sequences.
    """
    if classes:
        made_by = AutoModelForSequenceClassification
        return made_by.from_pretrained(path, dtype=dtype, num_labels=classes, pad_token_id=pad)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@torch.no_grad()
def quantize_whole(
    whole: Any, bounds: tuple[int, int], bits: Mapping[str, int], device: torch.device = CPU, dense: bool = False
) -> Any:
    """Gives the unsplit model the base weights that the parts of a run had.

    Args:
        whole: The library's causal LM, in the run's type; changed in place.
        bounds: The cut as (LO, HI).
        bits: By part, as for `load_parts`.
        device: Where it is.
        dense: Whether weights keep their type, and are only rounded to what the quantised ones stand for.
    """
    family = family_of(whole.config.model_type)
    blocks = whole.get_submodule(family.decoder).get_submodule(family.blocks)
    for kind, numbers in ranges(len(blocks), bounds).items():
        for number in numbers if kind in bits else ():
            for name, module in list(blocks[number].named_modules()):
                if type(module) not in (nn.Linear, Conv1D):
                    continue
                made = quantized(module.requires_grad_(False), bits[kind], whole.dtype, device)
                if dense:
                    rounded = dequantized(made)
                    module.weight.copy_(rounded if isinstance(module, nn.Linear) else rounded.t())
                else:
                    blocks[number].set_submodule(name, made)
    return whole if dense else _announced(whole, bits.values())
