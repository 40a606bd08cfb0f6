"""Products of rows with a weight, by the faster of the libraries that torch has for them.

torch gives products in float32 to MKL. On processors that MKL was not written for, oneDNN, which torch has too and
gives those in bfloat16 to, is 1.1 to 1.3 times as fast at the shapes of GPT-2 small, and 1.6 times at its head, whose
50,257 rows are no multiple of anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2**26
"""Multiplications from which on oneDNN is worth it: for every new number of rows it first compiles the product, which
takes 0.6 MB and up to a millisecond. How many it keeps is limited in `fedsplit.environment`.
"""

LONGEST = 2**15
"""Terms of a sum up to which oneDNN is the faster one."""


def _has_both() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()) and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )


BOTH = _has_both()
"""Whether this build of torch leaves a choice; none does that is not for x86."""


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`rows @ weight + bias`, of tensors of one type on one device; not seen by autograd.

    Args:
        rows: (N, I).
        weight: (I, O); a transposed view is as good as any.
        bias: (O,), or None.
        out: Memory that may be used (N, O), where there is no bias.

    Returns:
        (N, O), in `out` or not.
    """
    count, terms = rows.shape
    if (
        BOTH
        and rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and terms <= LONGEST
        and count * weight.numel() >= LEAST
        and torch.backends.mkldnn.enabled
    ):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight.t(), bias, "none", [], "")
        return result
    return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight)
