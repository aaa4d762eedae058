"""What ops with matrix products share: the dtype of products, and sums wider than what is added."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are made: autocast's where it is on, but for fp64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def add_product(total: Tensor, a: Tensor, b: Tensor, start: bool):
    """total = a b at the start, total += a b later, added in the dtype of total.

    Autocast, which would narrow the sums, must be off.
    """
    if not total.is_cuda:  # a CPU has no product with a wider sum
        a, b = a.to(total.dtype), b.to(total.dtype)
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if start else torch.addmm(total, a, b, out=total)
    elif start:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
