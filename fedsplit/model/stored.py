"""A checkpoint in safetensors, of which single tensors are read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from fedsplit.allowed import SettingError
from fedsplit.model.devices import CPU
from fedsplit.model.families import Family, family_of

_AT_ONCE = 32 * 2**20
"""Bytes of a tensor that are cast at a time."""


class Stored:
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
        checkpoint = Stored(path, family, torch.float32)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
        for name, parameter in whole.named_parameters():
            if (found := checkpoint.shape(name, tied(name, family))) != list(parameter.shape):
                raise ValueError(f"{name} has the shape {found}, config.json says {list(parameter.shape)}")
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the library makes of an impossible configuration
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        words = "a folder whose config.json and *.safetensors are whole and belong together"
        raise SettingError("model", f"{path} ({reason})", words) from None


def tied(name: str, family: Family) -> str:
    """The parameter that one may share its values with, where a checkpoint has it only once."""
    return f"{family.decoder}.{family.embedding}.weight" if name == "lm_head.weight" else name
