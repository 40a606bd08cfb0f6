"""Reads single tensors of a checkpoint in safetensors, and checks whole checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedsplit.errors import SettingError, first_line
from fedsplit.model.block_layers import is_uncalled
from fedsplit.model.derivation import family_of
from fedsplit.model.devices import CPU, TYPES
from fedsplit.model.fp8_weights import SCALE, unscaled
from fedsplit.model.parts import SCORE
from fedsplit.model.quantization import decoded
from fedsplit.model.stored_bits import (
    PackedWeight,
    bits_in,
    packed_weight,
    quantization_of,
    statistics_of,
    without_statistics,
)
from fedsplit.model.stored_names import Source, sources_of
from fedsplit.model.unsplit import empty_model, transposed_layers
from fedsplit.model.weight_files import INDEX, find_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE = slice(None)

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

    def __init__(
        self,
        path: Path,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """Finds the file of each tensor.

        Args:
            path: Folder of the checkpoint.
            model: The model without weights (`fedsplit.model.unsplit.empty_model`), for the names of tied parameters.
            dtype: Type of the returned parameters.
            device: Device of the returned parameters.
        """
        self._dtype = dtype
        self._device = device
        self._model = model
        self._files = find_tensors(path)
        self.bits = bits_in(quantization_of(path))
        self._statistics = statistics_of(self._files) if self.bits else {}
        # Statistics and scales are read with the weight that they belong to. As parameters the model does not know
        # them.
        names = without_statistics(self._files, self._statistics)
        self._sources = sources_of(model, [name for name in names if not name.endswith(SCALE)])
        # bitsandbytes stores every weight as (out, in), and a `Conv1D` has (in, out).
        turned = {f"{layer}.weight" for layer in transposed_layers(model)}
        present = turned & self._sources.keys()
        self._turned = {stored for name in present for stored in self._sources[name].names}
        self._parameters: dict[str, nn.Parameter] = {}
        ties: dict[str, str] = model.all_tied_weights_keys
        sources = {source: target for target, source in ties.items()}
        self._partners = {**ties, **sources}  # a checkpoint may have either of two tied parameters
        possible_ties = getattr(model, "_tied_weights_keys", None) or ()
        self._could_be_tied = {*possible_ties} - ties.keys()

    def _pieces(self, name: str) -> Source | None:
        """Returns where a parameter comes from. Ties are ignored. None if the files lack the parameter."""
        source = self._sources.get(name)
        return source if source is not None and source.is_complete else None

    def _find(self, name: str) -> Source:
        """Returns where a parameter comes from, or the parameter that it is tied to.

        Raises:
            ValueError: The files lack the parameter, and the tied parameter.
        """
        source = self._pieces(name)
        partner = self._partners.get(name)
        if source is None and partner:
            source = self._pieces(partner)
        if source is not None:
            return source
        why = ", and config.json does not say that it is tied to another one" if name in self._could_be_tied else ""
        raise ValueError(f"the checkpoint has no tensor {name}{why}")

    @property
    def is_quantised(self) -> bool:
        """True if the files have a weight in 4 or 8 bits."""
        return bool(self._statistics)

    def packed(self, name: str) -> PackedWeight | None:
        """Returns a weight that the files keep in 4 or 8 bits; None for other parameters.

        Args:
            name: Name of the parameter in the library's model.

        Raises:
            ValueError: The files lack the parameter, or its statistics do not belong to it.
        """
        source = self._find(name)
        quantised = [stored for stored in source.names if stored in self._statistics]
        if not quantised:
            return None
        if not source.is_plain:
            raise ValueError(f"{name} is put together from weights that are quantised one by one")
        packed = self._packed(quantised[0])
        if packed.bits != self.bits:
            raise ValueError(f"{name} is in {packed.bits} bits, and config.json says {self.bits}")
        return packed

    def _packed(self, stored: str) -> PackedWeight:
        """Reads a quantised weight by its name in the files."""
        names = self._statistics[stored]
        statistics = {key: self._whole(name) for key, name in names.items()}
        try:
            return packed_weight(self._whole(stored), statistics)
        except ValueError as error:
            raise ValueError(f"{stored} in {self._files[stored].name}: {error}") from None

    def _shape(self, name: str) -> list[int]:
        """Returns the shape of a tensor in the files; of a quantised weight the shape that it had before."""
        if name in self._statistics:
            rows, columns = self._packed(name).shape
            return [columns, rows] if name in self._turned else [rows, columns]
        with safe_open(self._files[name], framework="pt") as file:
            return list(file.get_slice(name).get_shape())

    def _stacked_shape(self, names: Sequence[str]) -> list[int]:
        """Returns the shape of a stack of tensors in the files."""
        return [len(names), *self._shape(names[0])]

    def _whole(self, name: str) -> Tensor:
        """Reads a tensor of the files at once, in its own type."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _mapped(self, name: str) -> Tensor | None:
        """Maps a tensor from the file, so that processes share memory. Returns None if the tensor needs a cast."""
        tensor = self._whole(name)
        return tensor if tensor.dtype == self._dtype else None

    def _slices(self, name: str, piece: Sequence[slice] = (_WHOLE,)) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of a tensor in the files, with the values, some rows at a time to keep memory small.

        Args:
            name: Name of the tensor in the files.
            piece: Rows, and columns if any, that are read.

        Yields:
            Rows in the piece, and their values.
        """
        if name in self._statistics:
            matrix = decoded(self._packed(name))
            values = (matrix.t() if name in self._turned else matrix)[tuple(piece)]
            yield slice(0, len(values)), values
            return
        if f"{name}{SCALE}" in self._files:
            values = unscaled(self._whole(name), self._whole(f"{name}{SCALE}"))[tuple(piece)]
            yield slice(0, len(values)), values
            return
        length, *row_shape = self._shape(name)
        # At 4 bytes for a value, the size in float32. A row without values counts as 1 byte, so that the division
        # works.
        row_bytes = max(1, 4 * torch.Size(row_shape).numel())
        rows = max(1, _AT_ONCE // row_bytes)
        first, last, _ = piece[0].indices(length)
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            place = slice(begin - first, end - first)
            chosen = (slice(begin, end), *piece[1:])
            # The file is opened anew for each slice, since pages of an open file stay resident.
            with safe_open(self._files[name], framework="pt") as file:
                yield place, file.get_slice(name)[chosen]

    def _fill(self, name: str, target: Tensor) -> None:
        """Reads a tensor of the files into memory, and casts it."""
        for place, values in self._slices(name):
            target[place] = values

    def has(self, name: str) -> bool:
        """Returns True if the files hold a parameter by name. A tie is not followed."""
        return self._pieces(name) is not None

    def shape(self, name: str) -> list[int]:
        """Returns the shape of a parameter, from the headers of the files."""
        source = self._find(name)
        if source.is_plain:
            return self._shape(source.names[0])
        if not source.is_stack:
            return list(self._converted(name, source).shape)
        shape, *more_shapes = [self._stacked_shape(names) for names in source.pieces]
        for piece_shape in more_shapes:
            if shape[0] != piece_shape[0]:
                raise ValueError(f"{name} has pieces of {shape[0]} and {piece_shape[0]} experts")
            shape[-2] += piece_shape[-2]
        return shape

    def parameter(self, name: str, device: torch.device | None = None) -> nn.Parameter:
        """Returns a frozen parameter by its name in the library's model.

        Args:
            name: The name.
            device: Device of a parameter that is read for the first time; None for the reader's device.
        """
        source = self._find(name)
        # By the name in the files, which two tied parameters have in common: the second finds the tensor of the
        # first.
        key = source.names[0] if source.is_plain else name
        if key not in self._parameters:
            # Mapped if possible: processes with the same file then share its pages.
            tensor = self._mapped(key) if source.is_plain else None
            if tensor is None:
                tensor = self._assembled(name, source)
            self._parameters[key] = nn.Parameter(tensor.to(device or self._device), requires_grad=False)
        return self._parameters[key]

    def piece(
        self,
        name: str,
        dimension: int,
        place: slice,
        device: torch.device,
    ) -> nn.Parameter:
        """Returns a frozen piece of a parameter. The rest of the parameter is not read.

        Args:
            name: Name of the parameter in the library's model. The parameter is a single tensor in the files.
            dimension: Dimension of the piece, 0 or 1.
            place: Positions of the piece in the dimension.
            device: Device of the piece.
        """
        (stored,) = self._find(name).names
        shape = self._shape(stored)
        shape[dimension] = len(range(*place.indices(shape[dimension])))
        tensor = torch.empty(shape, dtype=self._dtype)
        for rows, values in self._slices(stored, [_WHOLE] * dimension + [place]):
            tensor[rows] = values
        return nn.Parameter(tensor.to(device), requires_grad=False)

    def _assembled(self, name: str, source: Source) -> Tensor:
        """Reads the tensors of a parameter, and joins them as the library does."""
        if not source.is_plain and not source.is_stack:
            return self._converted(name, source)
        tensor = torch.empty(self.shape(name), dtype=self._dtype)
        if source.is_plain:
            self._fill(source.names[0], tensor)
            return tensor
        sizes = [self._stacked_shape(names)[-2] for names in source.pieces]
        for names, rows in zip(source.pieces, tensor.split(sizes, -2), strict=True):
            for stored, row in zip(names, rows, strict=True):
                self._fill(stored, row)
        return tensor

    def _converted(self, name: str, source: Source) -> Tensor:
        """Reads the tensors of a parameter, and converts them by the library's own operations."""
        tensors = []
        for names in source.pieces:
            piece = []
            for stored in names:
                values = torch.empty(self._shape(stored), dtype=self._dtype)
                self._fill(stored, values)
                piece.append(values)
            tensors.append(piece)
        return source.converted(name, tensors, self._model)

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
        for stored in dict.fromkeys(stored for name in names for stored in self._find(name).names):  # each once
            if stored in self._statistics:  # any code is a number, and `packed_weight` has checked the statistics
                continue
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
        # By identity, since `==` would compare the values of two tensors.
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
        if checkpoint.bits and not checkpoint.is_quantised:
            raise ValueError(f"config.json says that its weights are in {checkpoint.bits} bits, and none is")
        shapes = {}
        # Tied parameters are listed under both names: the files may have both, and either may have a wrong shape.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            is_new_head = classes > 0 and name.partition(".")[0] == SCORE
            if not is_new_head:
                shapes[name] = list(parameter.shape)
        for name, shape in shapes.items():
            if checkpoint.packed(name) is not None and not _can_be_quantised(name, model):
                raise ValueError(f"{name} is quantised, and is no projection of a block that computes by itself")
            stored_shape = checkpoint.shape(name)
            if stored_shape != shape:
                raise ValueError(f"{name} has the shape {stored_shape}, config.json says {shape}")
        checkpoint.check_values(shapes)
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # an impossible config.json raises many kinds
        allowed = "a folder whose config.json and weights are whole and belong together, as transformers loads them"
        raise SettingError("model", f"{path} ({first_line(error)})", allowed) from None


def _can_be_quantised(name: str, model: PreTrainedModel) -> bool:
    """Returns whether a parameter is the weight of a projection inside a block that computes by itself."""
    family = family_of(model.config)
    module_name, _, leaf = name.rpartition(".")
    is_plain = type(model.get_submodule(module_name)) is nn.Linear or module_name in transposed_layers(model)
    is_called = not is_uncalled(module_name, family)
    return is_plain and is_called and leaf == "weight" and name.startswith(f"{family.decoder}.{family.blocks}.")
