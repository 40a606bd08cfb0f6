"""The codec delta: differences to what the same example was decoded to in an earlier epoch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.casting import Raw
from fedsplit.wire.codecs import Codec, Place, Role
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.headers import Form, array_in, decoded_part, form_in, form_of, matrix_of, nested
from fedsplit.wire.row_cache import RowCache, Rows

_NOTHING, _ITSELF, _TYPICAL = range(3)
"""Source of a prediction: none, the example itself in an earlier epoch, or a typical token of another example."""


class Delta(Codec):
    """Sends how far each token has moved since the example crossed last; `--wire.codec delta[:THRESHOLD]`.

    Both sides keep what the receiver has decoded, and both add the decoded difference. So an error of the values on
    the wire does not grow from epoch to epoch: the next difference contains the error (AQ-SGD, 2206.01299, proves a
    bound). A token that has moved by less than the threshold, relative to its norm, does not cross (SplitCom,
    2602.10564).

    An example that crosses for the first time is predicted by a typical token of the example before: the median over
    its tokens. Hidden states of many models have a few dimensions that are large in all tokens. Without them, groups of
    values have smaller scales, so that coarse codecs lose less. An example that has moved by more than its own norm
    crosses whole.

    Rows that were used least recently leave the cache (`fedsplit.wire.row_cache`).

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> codec = Delta(threshold=0.1, budget=1000)
        >>> roles = [Role("activation", "up", StepKey(1, 0, step), examples=(5,)) for step in range(2)]
        >>> first, second = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.5], [2.1]]])
        >>> codec.encode(first, roles[0]).array("moved.values").tolist()
        [[1.0], [2.0]]
        >>> codec.encode(second, roles[1]).array("moved.values").tolist()
        [[0.5]]
    """

    needs_examples = True

    def __init__(self, threshold: float, budget: int, rest: Codec | None = None) -> None:
        """Starts with empty caches.

        Args:
            threshold: Least movement of a token that crosses, as a share of the token's norm.
            budget: Most bytes of the rows that are kept for a client.
            rest: Codec of the differences; None for exact differences.
        """
        self._threshold = threshold
        self._cache = RowCache(budget)
        self._rest = rest or Raw()

    @classmethod
    def at(cls, place: Place) -> Delta:
        """Returns a new codec for a place in a chain."""
        assert place.parameter is not None
        return cls(place.parameter, place.cache, place.rest)

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor."""
        form = form_of(tensor, role)
        values = _by_example(form, matrix_of(tensor))
        predicted, sources = self._predicted(form, role)
        difference = values - predicted
        norms, distances = _norms(values), _norms(difference)
        # An example that has changed altogether is nearer to zero than to its prediction.
        is_near = distances.square().sum(1) < norms.square().sum(1)
        sources = sources * is_near
        is_used = sources > _NOTHING
        predicted[~is_used] = 0
        difference[~is_used] = values[~is_used]
        is_still = distances <= self._threshold * norms  # never of an example that is not finite, which is not near
        is_moved = ~(is_still & is_used[:, None])
        sent = self._rest.encode(difference[is_moved].to(form.dtype), role)
        predicted[is_moved] += self._rest.decode(sent, role).float()
        self._keep(predicted, form, role)
        arrays, facts = nested({"moved": sent})
        used: np.ndarray = sources.numpy()
        arrays |= {"tokens": _packed(is_moved), "examples": used}
        return Encoded(arrays, {**form.header(), **facts})

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor.

        Raises:
            MalformedPacket: The arrays do not fit the shape, or a prediction is not in the cache.
        """
        form = form_in(encoded, role)
        predicted, known = self._predicted(form, role)
        examples, tokens, _ = predicted.shape
        sources = array_in(encoded, "examples", np.uint8, examples)
        is_moved = _unpacked(encoded, "tokens", (examples, tokens))
        # A side that has lost a row would add the difference to another prediction.
        if bool(((sources != _NOTHING) & (sources != known)).any()):
            raise MalformedPacket("a difference came to an example that is not in the cache of this side")
        predicted[sources == _NOTHING] = 0
        shape = int(is_moved.sum()), form.width
        predicted[is_moved] += decoded_part(encoded, "moved", self._rest, role, shape)
        self._keep(predicted, form, role)
        return form.tensor(predicted)

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the caches."""
        return self._cache.states()

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces the caches."""
        self._cache.restore(states)

    def _predicted(self, form: Form, role: Role) -> tuple[Tensor, Tensor]:
        """Returns predictions of the examples (B, T, D), and the source of each prediction (B,).

        Raises:
            MalformedPacket: The role has another number of examples than the tensor.
        """
        if role.examples and (len(form.shape) != 3 or len(role.examples) != form.shape[0]):
            raise MalformedPacket(f"{len(role.examples)} numbers of examples do not fit a tensor {form.shape}")
        predicted = _by_example(form, torch.zeros(form.rows, form.width))
        sources = torch.full((len(predicted),), _NOTHING, dtype=torch.uint8)
        rows = self._cache.before(role)
        for place, example in enumerate(role.examples):
            kept = rows.get(example)
            # A batch is padded to its longest text, so that one text may have several lengths.
            if kept is not None and kept.shape == predicted[place].shape:
                predicted[place] = kept
                sources[place] = _ITSELF
        is_new = sources == _NOTHING
        if rows and bool(is_new.any()):
            typical = _typical_token(rows)
            if len(typical) == form.width:
                predicted[is_new] = typical
                sources[is_new] = _TYPICAL
        return predicted, sources

    def _keep(self, decoded: Tensor, form: Form, role: Role) -> None:
        """Keeps the decoded rows (B, T, D) in their type behind the wire."""
        rows = decoded.to(form.dtype, copy=True).unbind() if role.examples else ()
        self._cache.set_after(role, dict(zip(role.examples, rows, strict=True)))


def _by_example(form: Form, matrix: Tensor) -> Tensor:
    """Returns a matrix as (B, T, D). A tensor of fewer dimensions than three counts as one example."""
    examples = form.shape[0] if len(form.shape) == 3 else 1
    tokens = form.rows // examples if examples else 0
    return matrix.reshape(examples, tokens, form.width)


def _typical_token(rows: Rows) -> Tensor:
    """Returns the median over the tokens of the example that was used last (D,).

    A median is one of the kept values, and so has the same bits on both sides. The first token of a text, which is
    hundreds of times as large as the others in some models, does not move the median.
    """
    newest = rows[list(rows)[-1]]
    return newest.float().median(0).values


def _norms(values: Tensor) -> Tensor:
    """Returns the norm of each token, in float64: squares of large values are infinite in float32."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)


def _packed(flags: Tensor) -> np.ndarray:
    """Returns flags as bits."""
    return np.packbits(flags.numpy().reshape(-1))


def _unpacked(encoded: Encoded, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns flags from bits.

    Raises:
        MalformedPacket: The number of bits does not fit the shape.
    """
    count = int(np.prod(shape))
    packed = array_in(encoded, name, np.uint8, -(-count // 8))
    bits = np.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits).bool().view(shape)
