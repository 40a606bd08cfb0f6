"""Matrix products in float32 on a CPU, by the faster of torch's two libraries: MKL or oneDNN.

torch computes products in float32 with MKL, and products in bfloat16 with oneDNN. On processors outside of MKL's scope,
oneDNN is faster in float32 too: 1.1 to 1.3 times at the shapes of GPT-2 small, and 1.6 times at the head of GPT-2
small. (The head's 50,257 rows are no multiple of a vector's width.)
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2**26
"""Smallest number of multiplications for oneDNN. oneDNN compiles a product for every new number of rows, in up to a
millisecond and 0.6 MB. `fedsplit.environment` limits the number of compiled products in memory.
"""

LONGEST = 2**15
"""Largest number of terms of a sum for which oneDNN is faster."""


def _has_both() -> bool:
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return bool(both) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


BOTH = _has_both()
"""True if this build of torch has both libraries. Only builds for x86 have both."""


def product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `rows @ weight + bias`. Autograd does not record the product.

    Args:
        rows: (N, I).
        weight: (I, O), of the same type and device. A transposed view is as fast as a contiguous tensor.
        bias: (O,), or None.
        out: Memory (N, O) for the result, without a bias only. The result may be in new memory all the same.

    Returns:
        The product (N, O).

    Example:
        >>> product(torch.ones(1, 2), torch.tensor([[1.0], [2.0]]), bias=torch.tensor([0.5]))
        tensor([[3.5000]])
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
    if bias is None:
        return torch.mm(rows, weight, out=out)
    return torch.addmm(bias, rows, weight)
