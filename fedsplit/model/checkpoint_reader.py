"""A checkpoint in safetensors, of which single tensors are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedsplit.allowed import SettingError
from fedsplit.model.devices import CPU, TYPES
from fedsplit.model.families import family_of
from fedsplit.model.parts import SCORE
from fedsplit.model.unsplit import empty_model
from fedsplit.model.weight_files import INDEX, find_tensors

_AT_ONCE = 32 * 2**20
"""Bytes of a tensor that are read at a time."""


class CheckpointReader:
    """Reads single tensors of a checkpoint in safetensors, sharded or not.

    A tensor that is read twice (an embedding tied to the head) is kept once. Experts that are stored one by one are
    put together as the library has them.
    """

    def __init__(self, path: Path, model: Any, dtype: torch.dtype, device: torch.device = CPU) -> None:
        """Looks up where each tensor lies.

        Args:
            path: The checkpoint's folder.
            model: The library's model that the tensors are for, without weights (`fedsplit.model.unsplit.blank`). It
                knows which parameters are tied to each other.
            dtype: Type of the parameters that are read.
            device: Device of the parameters that are read.
        """
        self._family = family_of(model.config.model_type)
        self._dtype = dtype
        self._device = device
        self._prefix = f"{self._family.decoder.partition('.')[0]}."
        self._files = find_tensors(path)
        self._kept: dict[str, nn.Parameter] = {}
        ties: dict[str, str] = model.all_tied_weights_keys
        self._partners = {**ties, **{source: target for target, source in ties.items()}}
        self._could_be_tied = {*(getattr(model, "_tied_weights_keys", None) or ())} - ties.keys()

    def _known(self, pattern: str) -> str | None:
        """Returns the name in the files of a piece: the library's own, or that without the decoder's prefix."""
        candidates = dict.fromkeys((pattern, pattern.removeprefix(self._prefix)))
        found = [name for name in candidates if name.replace("*", "0") in self._files]
        if len(found) > 1:
            raise ValueError(f"the checkpoint has one tensor twice, as {found[0]} and as {found[1]}")
        return found[0] if found else None

    def _pieces(self, name: str) -> list[str]:
        """Returns the names in the files of a parameter's pieces, without regard to ties; none if one is missing."""
        options = [[name]]
        for end, pieces in self._family.stored.items():
            if name.endswith(end):
                options.append([name.removesuffix(end) + piece for piece in pieces])
        complete = []
        for option in options:
            found = [known for piece in option if (known := self._known(piece))]
            if len(found) == len(option):
                complete.append(found)
        if len(complete) > 1:
            raise ValueError(f"the checkpoint has one tensor twice, as {complete[0][0]} and as {complete[1][0]}")
        return complete[0] if complete else []

    def _find(self, name: str) -> list[str]:
        """Returns the names in the files of a parameter's pieces, with `*` for the number of the expert.

        A parameter that the files lack is the one that it is tied to, if the library ties it in this model.

        Raises:
            ValueError: The files have neither.
        """
        partner = self._partners.get(name)
        if found := self._pieces(name) or (self._pieces(partner) if partner else []):
            return found
        why = ", and config.json does not say that it is tied to another one" if name in self._could_be_tied else ""
        raise ValueError(f"the checkpoint has no tensor {name}{why}")

    def _experts(self, pattern: str) -> list[str]:
        """Returns the names in the files of all experts' tensors, by the number of the expert."""
        numbered = (pattern.replace("*", str(number)) for number in itertools.count())
        return list(itertools.takewhile(self._files.__contains__, numbered))

    def _shape(self, pattern: str) -> list[int]:
        if "*" in pattern:
            names = self._experts(pattern)
            return [len(names), *self._shape(names[0])]
        with safe_open(self._files[pattern], framework="pt") as file:
            return list(file.get_slice(pattern).get_shape())

    def _mapped(self, name: str) -> Tensor | None:
        """Returns a tensor as it lies in the file, whose pages processes share; None if it is of another type."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor if tensor.dtype == self._dtype else None

    def _slices(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yields a tensor of the files some rows at a time, so that little of it is in memory."""
        length, *others = self._shape(name)
        rows = max(1, _AT_ONCE // max(1, 4 * torch.Size(others).numel()))
        for begin in range(0, length, rows):
            place = slice(begin, min(begin + rows, length))
            # Opened anew each time: what was read of a file stays resident until it is closed.
            with safe_open(self._files[name], framework="pt") as file:
                yield place, file.get_slice(name)[place]

    def _fill(self, pattern: str, target: Tensor) -> None:
        """Reads a tensor into its place, and casts it."""
        if "*" in pattern:
            for row, name in zip(target, self._experts(pattern), strict=True):
                self._fill(name, row)
            return
        for place, values in self._slices(pattern):
            target[place] = values

    def has(self, name: str) -> bool:
        """Returns whether the files hold a parameter under a name of its own, tied or not."""
        return bool(self._pieces(name))

    def shape(self, name: str) -> list[int]:
        """Returns the shape of a parameter, from the files' headers."""
        shape, *others = [self._shape(piece) for piece in self._find(name)]
        for other in others:
            if shape[0] != other[0]:
                raise ValueError(f"{name} has pieces of {shape[0]} and {other[0]} experts")
            shape[-2] += other[-2]
        return shape

    def parameter(self, name: str) -> nn.Parameter:
        """Returns a frozen parameter by its name in the library's model."""
        first, *others = pieces = self._find(name)
        if first not in self._kept:
            tensor = self._mapped(first) if not others and "*" not in first else None
            if tensor is None:
                tensor = torch.empty(self.shape(name), dtype=self._dtype)
                sizes = [self._shape(piece)[-2] for piece in pieces] if others else []
                places = tensor.split(sizes, -2) if others else [tensor]
                for piece, place in zip(pieces, places, strict=True):
                    self._fill(piece, place)
            self._kept[first] = nn.Parameter(tensor.to(self._device), requires_grad=False)
        return self._kept[first]

    def check_files(self) -> None:
        """Makes sure that all files are there.

        Raises:
            ValueError: The index names a shard that is not.
        """
        for file in sorted({*self._files.values()}):
            if not file.is_file():
                raise ValueError(f"its {INDEX} names {file.name}, which is not there")

    def check_values(self, names: Iterable[str]) -> None:
        """Reads the values of parameters, and makes sure that they are finite in the type that they will have.

        Raises:
            ValueError: The files hold a NaN or an infinity.
            SettingError: A value is beyond the type.
        """
        patterns = dict.fromkeys(pattern for name in names for pattern in self._find(name))
        for pattern in patterns:
            for stored in self._experts(pattern) if "*" in pattern else [pattern]:
                for _, values in self._slices(stored):
                    self._check_finite(values, stored)

    def _check_finite(self, values: Tensor, stored: str) -> None:
        """Looks at the extremes: a NaN is both, and a cast keeps the order."""
        if not values.numel():
            return
        wide = values.float() if values.element_size() == 1 else values  # torch finds no extremes of float8
        extremes = torch.stack(torch.aminmax(wide))
        where = f"{stored} in {self._files[stored].name}"
        if not bool(extremes.isfinite().all()):
            raise ValueError(f"{where} holds values that are not finite")
        if not bool(extremes.to(self._dtype).isfinite().all()):
            name = next(name for name, dtype in TYPES.items() if dtype == self._dtype)
            words = f"a type that holds the model's weights; {where} goes up to {float(extremes.abs().max()):g}"
            raise SettingError("dtype", name, words)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps some parameters no longer, for others that are tied to them."""
        gone = {id(parameter) for parameter in parameters}
        self._kept = {name: kept for name, kept in self._kept.items() if id(kept) not in gone}


def check_checkpoint(path: Path, dtype: str = "fp32", classes: int = 0) -> None:
    """Makes sure that a checkpoint has every tensor of a model, in its shape and with finite values.

    All values are read once, some at a time: the first step of a run would read them anyway, and would blame a client
    for a NaN among them.

    Args:
        path: The checkpoint's folder.
        dtype: Type that a run holds the weights in, one of `fedsplit.allowed.DTYPES`.
        classes: Number of classes of a classifier, whose head is drawn and not read; 0 for a model of tokens.

    Raises:
        SettingError: A file is missing or cut short, a tensor is missing or not what config.json says, or a value is
            not finite.
    """
    try:
        model = empty_model(path, classes)
        checkpoint = CheckpointReader(path, model, TYPES[dtype])
        checkpoint.check_files()
        shapes = {
            name: list(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not (classes and name.partition(".")[0] == SCORE)
        }
        for name, shape in shapes.items():
            if (found := checkpoint.shape(name)) != shape:
                raise ValueError(f"{name} has the shape {found}, config.json says {shape}")
        checkpoint.check_values(shapes)
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the library makes of an impossible configuration
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        words = "a folder whose config.json and weights are whole and belong together, as transformers loads them"
        raise SettingError("model", f"{path} ({reason})", words) from None
