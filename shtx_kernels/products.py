"""Products of matrices: dtypes and precision, narrow copies of weights, sums in a wider dtype."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from .internals import copy_all

_here = threading.local()  # holds this thread's narrow copies of weights within `narrow_weights`


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are made: autocast's where it is on, except for fp64."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def matmul_precision() -> str:
    """Return the precision of products of fp32 on a GPU: "ieee", or "tf32" if the user allows it.

    Both torch.set_float32_matmul_precision and torch.backends.*.fp32_precision count. PyTorch's
    getter of the first raises once the second was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def narrow_copies(weights: list[Parameter], dtype: torch.dtype) -> dict:
    """A copy in `dtype` of each weight, made in one call, for `narrow_weights`."""
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    with torch.no_grad():
        copy_all(copies, weights)
    keys = ((id(weight), dtype) for weight in weights)
    return dict(zip(keys, zip(weights, copies, strict=True), strict=True))


@contextmanager
def narrow_weights(copies: dict) -> Iterator[None]:
    """Return a context in which ops of this thread take narrow copies of weights from `copies`.

    A copy that is missing is made once, and added. The weights must not change while `copies` is in
    use.
    """
    before, _here.copies = getattr(_here, "copies", None), copies
    try:
        yield
    finally:
        _here.copies = before


def narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`: its copy within `narrow_weights`, else a new one."""
    if weight.dtype == dtype or torch.compiler.is_compiling():
        return weight.to(dtype)
    copies = getattr(_here, "copies", None)
    # a weight that was computed, not stored, is another tensor in every call
    if copies is None or type(weight) is not Parameter:
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in copies:
        copies[key] = weight, weight.detach().to(dtype)
    return copies[key][1]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), in less time if x has that dtype already."""
    return x if x.dtype == dtype else x.to(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_product(total: Tensor, a: Tensor, b: Tensor, start: bool):
    """total = a b with `start`, else total += a b, summed in the dtype of total.

    Autocast leaves products with `out` alone; it would narrow the sums of others.
    """
    if not total.is_cuda:  # on a CPU, PyTorch has no product whose sums are wider than its factors
        a, b = cast(a, total.dtype), cast(b, total.dtype)
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if start else torch.addmm(total, a, b, out=total)
    elif start:
        torch.mm(a, b, total.dtype, out=total)
    else:
        torch.addmm(total, a, b, total.dtype, out=total)
