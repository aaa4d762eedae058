"""What ops with products share: their dtype, precision, narrow weights, sums in a wider dtype."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_kept: dict | None = None  # within `narrow_weights_kept`


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are made: autocast's where it is on, but for fp64."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def matmul_precision() -> str:
    """How products of fp32 are made on a GPU: "ieee", or "tf32" where the user allows that.

    It is what both torch.set_float32_matmul_precision and torch.backends.*.fp32_precision say;
    PyTorch's getter of the first raises once the second was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextmanager
def narrow_weights_kept(copies: dict) -> Iterator[None]:
    """Within, a weight has one narrow copy, which goes into `copies`.

    Handed in again, all copies that are there are made anew at once: of the same weights.
    """
    global _kept
    with torch.no_grad():
        if copies:
            weights, narrow = map(list, zip(*copies.values(), strict=True))
            torch._foreach_copy_(narrow, weights)
    before, _kept = _kept, copies
    try:
        yield
    finally:
        _kept = before


def narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`."""
    if torch.compiler.is_compiling() or weight.dtype == dtype or _kept is None:
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in _kept:
        _kept[key] = weight, weight.detach().to(dtype)
    return _kept[key][1]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; in less time than x.to takes where that is x."""
    return x if x.dtype == dtype else x.to(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of `dtype` are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_product(total: Tensor, a: Tensor, b: Tensor, start: bool):
    """total = a b at the start, total += a b later, added in the dtype of total.

    Products with `out` are not autocast's, which would narrow the sums.
    """
    if not total.is_cuda:  # a CPU has no product with a wider sum
        a, b = cast(a, total.dtype), cast(b, total.dtype)
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if start else torch.addmm(total, a, b, out=total)
    elif start:
        torch.mm(a, b, total.dtype, out=total)
    else:
        torch.addmm(total, a, b, total.dtype, out=total)
