"""Reads single tensors of a checkpoint in safetensors, and checks whole checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedsplit.errors import SettingError, first_line
from fedsplit.model.devices import CPU, TYPES
from fedsplit.model.families import family_of
from fedsplit.model.parts import SCORE
from fedsplit.model.unsplit import empty_model
from fedsplit.model.weight_files import INDEX, find_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AT_ONCE = 32 * 2**20
"""Number of bytes of a tensor that are read at a time."""


class CheckpointReader:
    """Reads single tensors of a checkpoint in safetensors, sharded or not.

    A shared tensor (an embedding tied to the head) is in memory once. Experts that are stored one by one are stacked,
    as in the library's models.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> reader = CheckpointReader(BUNDLED_MODEL, empty_model(BUNDLED_MODEL), torch.float32)
        >>> reader.shape("transformer.wte.weight")
        [1024, 128]
        >>> reader.parameter("lm_head.weight") is reader.parameter("transformer.wte.weight")  # tied
        True
    """

    def __init__(self, path: Path, model: PreTrainedModel, dtype: torch.dtype, device: torch.device = CPU) -> None:
        """Finds the file of each tensor.

        Args:
            path: Folder of the checkpoint.
            model: The model without weights (`fedsplit.model.unsplit.empty_model`), for the names of tied parameters.
            dtype: Type of the returned parameters.
            device: Device of the returned parameters.
        """
        self._family = family_of(model.config.model_type)
        self._dtype = dtype
        self._device = device
        self._prefix = f"{self._family.decoder.partition('.')[0]}."
        self._files = find_tensors(path)
        self._parameters: dict[str, nn.Parameter] = {}
        ties: dict[str, str] = model.all_tied_weights_keys
        sources = {source: target for target, source in ties.items()}
        self._partners = {**ties, **sources}  # a checkpoint may have either of two tied parameters
        possible_ties = getattr(model, "_tied_weights_keys", None) or ()
        self._could_be_tied = {*possible_ties} - ties.keys()

    def _known(self, pattern: str) -> str | None:
        """Returns the name of a piece in the files: the library's name, with or without the decoder's prefix.

        Raises:
            ValueError: The files have both names.
        """
        candidates = dict.fromkeys((pattern, pattern.removeprefix(self._prefix)))
        names = [name for name in candidates if name.replace("*", "0") in self._files]
        if len(names) > 1:
            raise ValueError(f"the checkpoint has one tensor twice, as {names[0]} and as {names[1]}")
        return names[0] if names else None

    def _pieces(self, name: str) -> list[str]:
        """Returns the names of a parameter's pieces in the files. Ties are ignored. Empty if a piece is missing."""
        options = [[name]]
        for end, pieces in self._family.stored.items():
            if name.endswith(end):
                options.append([name.removesuffix(end) + piece for piece in pieces])
        complete = []
        for option in options:
            names = [name for name in map(self._known, option) if name]
            if len(names) == len(option):
                complete.append(names)
        if len(complete) > 1:
            raise ValueError(f"the checkpoint has one tensor twice, as {complete[0][0]} and as {complete[1][0]}")
        return complete[0] if complete else []

    def _find(self, name: str) -> list[str]:
        """Returns the names of a parameter's pieces in the files, with `*` for the number of an expert.

        If the files lack the parameter, the pieces of the tied parameter are returned.

        Raises:
            ValueError: The files lack the parameter, and the tied parameter.
        """
        partner = self._partners.get(name)
        pieces = self._pieces(name)
        if not pieces and partner:
            pieces = self._pieces(partner)
        if pieces:
            return pieces
        why = ", and config.json does not say that it is tied to another one" if name in self._could_be_tied else ""
        raise ValueError(f"the checkpoint has no tensor {name}{why}")

    def _experts(self, pattern: str) -> list[str]:
        """Returns the names of all experts' tensors in the files, in the order of the experts."""
        numbered = (pattern.replace("*", str(number)) for number in itertools.count())
        return list(itertools.takewhile(self._files.__contains__, numbered))  # up to the first missing number

    def _shape(self, pattern: str) -> list[int]:
        if "*" in pattern:
            names = self._experts(pattern)
            return [len(names), *self._shape(names[0])]
        with safe_open(self._files[pattern], framework="pt") as file:
            return list(file.get_slice(pattern).get_shape())

    def _mapped(self, name: str) -> Tensor | None:
        """Maps a tensor from the file, so that processes share memory. Returns None if the tensor needs a cast."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor if tensor.dtype == self._dtype else None

    def _slices(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of a tensor in the files, with the values, some rows at a time to keep memory small."""
        length, *row_shape = self._shape(name)
        row_bytes = max(1, 4 * torch.Size(row_shape).numel())
        rows = max(1, _AT_ONCE // row_bytes)
        for begin in range(0, length, rows):
            place = slice(begin, min(begin + rows, length))
            # The file is opened anew for each slice, since pages of an open file stay resident.
            with safe_open(self._files[name], framework="pt") as file:
                yield place, file.get_slice(name)[place]

    def _fill(self, pattern: str, target: Tensor) -> None:
        """Reads a tensor, or the stack of all experts' tensors, into memory, and casts it."""
        if "*" in pattern:
            for row, name in zip(target, self._experts(pattern), strict=True):
                self._fill(name, row)
            return
        for place, values in self._slices(pattern):
            target[place] = values

    def has(self, name: str) -> bool:
        """Returns True if the files hold a parameter by name. A tie is not followed."""
        return bool(self._pieces(name))

    def shape(self, name: str) -> list[int]:
        """Returns the shape of a parameter, from the headers of the files."""
        shape, *more_shapes = [self._shape(piece) for piece in self._find(name)]
        for piece_shape in more_shapes:
            if shape[0] != piece_shape[0]:
                raise ValueError(f"{name} has pieces of {shape[0]} and {piece_shape[0]} experts")
            shape[-2] += piece_shape[-2]
        return shape

    def parameter(self, name: str) -> nn.Parameter:
        """Returns a frozen parameter by its name in the library's model."""
        pieces = self._find(name)
        key = pieces[0]
        if key not in self._parameters:
            single = len(pieces) == 1 and "*" not in key
            tensor = self._mapped(key) if single else None
            if tensor is None:
                tensor = self._assembled(name, pieces)
            self._parameters[key] = nn.Parameter(tensor.to(self._device), requires_grad=False)
        return self._parameters[key]

    def _assembled(self, name: str, pieces: list[str]) -> Tensor:
        """Reads the pieces of a parameter, and joins them by rows."""
        tensor = torch.empty(self.shape(name), dtype=self._dtype)
        if len(pieces) == 1:
            self._fill(pieces[0], tensor)
            return tensor
        sizes = [self._shape(piece)[-2] for piece in pieces]
        for piece, rows in zip(pieces, tensor.split(sizes, -2), strict=True):
            self._fill(piece, rows)
        return tensor

    def check_files(self) -> None:
        """Checks that all files exist.

        Raises:
            ValueError: The index names a shard that does not exist.
        """
        for file in sorted({*self._files.values()}):
            if not file.is_file():
                raise ValueError(f"its {INDEX} names {file.name}, which is not there")

    def check_values(self, names: Iterable[str]) -> None:
        """Reads the values of parameters, and checks that all values are finite, also after the cast.

        Raises:
            ValueError: The files hold a NaN or an infinity.
            SettingError: A value is too large for the type.
        """
        patterns = dict.fromkeys(pattern for name in names for pattern in self._find(name))  # each piece once
        for pattern in patterns:
            names_in_files = self._experts(pattern) if "*" in pattern else [pattern]
            for stored in names_in_files:
                for _, values in self._slices(stored):
                    self._check_finite(values, stored)

    def _check_finite(self, values: Tensor, stored: str) -> None:
        """Checks that the smallest and the largest value are finite, before and after the cast.

        The extremes suffice: torch returns a NaN as both extremes, and a cast keeps the order of values.

        Raises:
            ValueError: The files hold a NaN or an infinity.
            SettingError: A value is too large for the type.
        """
        if not values.numel():
            return
        wide = values.float() if values.element_size() == 1 else values  # torch finds no extremes of float8
        extremes = torch.stack(torch.aminmax(wide))
        where = f"{stored} in {self._files[stored].name}"
        if not bool(extremes.isfinite().all()):
            raise ValueError(f"{where} holds values that are not finite")
        if not bool(extremes.to(self._dtype).isfinite().all()):
            name = next(name for name, dtype in TYPES.items() if dtype == self._dtype)
            allowed = f"a type that holds the model's weights; {where} goes up to {float(extremes.abs().max()):g}"
            raise SettingError("dtype", name, allowed)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops parameters from memory. Otherwise the reader keeps each parameter, for a second part with a tie."""
        dropped = {id(parameter) for parameter in parameters}
        for key, value in list(self._parameters.items()):
            if id(value) in dropped:
                del self._parameters[key]


def check_checkpoint(path: Path, dtype: str = "fp32", classes: int = 0) -> None:
    """Checks that a checkpoint has every tensor of a model, in the right shape and with finite values.

    All values are read once, some at a time. The first step of a run reads the values anyway, and would report a NaN in
    the weights as the fault of a client.

    Args:
        path: Folder of the checkpoint.
        dtype: Type of the run's base weights, a name in `fedsplit.settings.choices.DTYPES`.
        classes: Number of classes of a classifier with a drawn head; 0 for a language model.

    Raises:
        SettingError: A file is missing or truncated, a tensor is missing or differs in shape from config.json, or a
            value is not finite.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> check_checkpoint(BUNDLED_MODEL)
    """
    try:
        model = empty_model(path, classes)
        checkpoint = CheckpointReader(path, model, TYPES[dtype])
        checkpoint.check_files()
        shapes = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            is_new_head = classes > 0 and name.partition(".")[0] == SCORE
            if not is_new_head:
                shapes[name] = list(parameter.shape)
        for name, shape in shapes.items():
            stored_shape = checkpoint.shape(name)
            if stored_shape != shape:
                raise ValueError(f"{name} has the shape {stored_shape}, config.json says {shape}")
        checkpoint.check_values(shapes)
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # an impossible config.json raises many kinds
        allowed = "a folder whose config.json and weights are whole and belong together, as transformers loads them"
        raise SettingError("model", f"{path} ({first_line(error)})", allowed) from None
