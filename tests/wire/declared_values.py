"""Values of any declared type for properties, and their comparison to the bit."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of several types and shapes, NaN and gaps among them."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if tensor.numel() and draw(st.booleans()):
        tensor.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -0.0]))
    transposed = tensor.T if tensor.ndim == 2 else tensor
    return transposed.to(draw(st.sampled_from(DTYPES)))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Returns a strategy for values of a type hint."""
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63),
        float: st.floats(),
        str: st.text(max_size=8),
        type(None): st.none(),
        Tensor: tensors(),
    }
    if hint in simple:
        return simple[hint]
    arguments = get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        assert isinstance(hint, type)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    match get_origin(hint):
        case origin if origin is Literal:
            return st.sampled_from(arguments)
        case origin if origin in (Union, types.UnionType):
            return st.one_of(*map(values, arguments))
        case origin if origin is tuple:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        case origin if origin is frozenset:
            return st.frozensets(values(arguments[0]), max_size=3)
        case origin if origin in (dict, Mapping):
            return st.dictionaries(*map(values, arguments), max_size=3)
    raise TypeError(f"no values for {hint}")


def plain(value: Any) -> Any:
    """Returns a value in a form whose `==` compares tensors, fields and floats to the bit."""
    if isinstance(value, Tensor):
        kept = value.detach().contiguous()
        return "tensor", kept.dtype, tuple(kept.shape), kept.flatten().view(torch.uint8).tolist()
    if isinstance(value, float):
        return "float", repr(value)
    if dataclasses.is_dataclass(value):
        return type(value), {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return type(value), value
