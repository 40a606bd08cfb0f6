"""A codec with a memory, as a user writes one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.wire.codecs import Codec, CodecMemory, Role
from fedsplit.wire.encoded import Encoded


class TopK(Codec):
    """Sends the largest tenth of a gradient, and adds the rest to the next one (error feedback, 1809.07599)."""

    def __init__(self) -> None:
        self._residuals = CodecMemory[Tensor]()

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        values = tensor.detach().flatten()
        header = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": tuple(tensor.shape)}
        if role.kind == "activation":
            return Encoded({"values": values.numpy()}, header)

        residual = self._residuals.before(role)
        if residual is not None and residual.shape == values.shape:
            values = values + residual
        places = values.abs().topk(math.ceil(len(values) / 10)).indices
        kept = torch.zeros_like(values).index_copy(0, places, values[places])
        self._residuals.set_after(role, values - kept)
        return Encoded({"values": values[places].numpy(), "places": places.int().numpy()}, header)

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        values, shape = torch.from_numpy(encoded.array("values")), encoded.fact("shape", tuple)
        if role.kind == "activation":
            return values.reshape(shape)
        places = torch.from_numpy(encoded.array("places")).long()
        return torch.zeros(math.prod(shape)).index_copy(0, places, values).reshape(shape)

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        return self._residuals.states()

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        self._residuals.restore(states)
