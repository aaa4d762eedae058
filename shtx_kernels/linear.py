"""A linear layer without bias.

    y = x W^T

The one idea: the gradient of W is summed in fp32 and leaves the product in fp32. Under autocast,
PyTorch rounds it to the dtype of the product and widens it again. The products are cuBLAS's.
Reference: reference.linear
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import apply, as_needed, first_order
from ._register import register
from ._weights import check_weight
from .products import add_product, cast, narrow, product_dtype, sum_dtype


def _new_gradients(x, weight, needs_dx, needs_dweight) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients, empty if not needed; that of the weight is in the dtype of sums."""
    dweight = weight.shape if needs_dweight else (0,)
    return (
        x.new_empty(*(x.shape if needs_dx else (0,))),
        x.new_empty(*dweight, dtype=sum_dtype(x.dtype)),
    )


def _linear_bwd(dy, x, weight, needs_dx, needs_dweight):
    dx, dweight = _new_gradients(x, weight, needs_dx, needs_dweight)
    dy = dy.flatten(0, 1)
    if needs_dx:
        torch.mm(dy, weight, out=dx.flatten(0, 1))
    if needs_dweight:
        add_product(dweight, dy.T, x.flatten(0, 1), start=True)
    return dx, dweight


_forward = register(
    "linear",
    "(Tensor x, Tensor weight) -> Tensor",
    F.linear,
    fake=lambda x, weight: x.new_empty(*x.shape[:2], weight.shape[0]),
    flops=lambda x, weight, **_: 2 * prod(x) * weight[0],
)
_backward = register(
    "linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, bool needs_dx, bool needs_dweight) -> (Tensor, Tensor)",
    _linear_bwd,
    fake=lambda dy, *arguments: _new_gradients(*arguments),
    flops=lambda dy, x, weight, *needs, **_: 2 * prod(x) * weight[0] * sum(needs),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, dtype):
        ctx.dtypes = x.dtype, weight.dtype
        x, weight = cast(x, dtype).contiguous(), narrow(weight, dtype).contiguous()
        ctx.save_for_backward(x, weight)
        return _forward(x, weight)

    @staticmethod
    @first_order("linear")
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:2]
        gradients = _backward(dy.contiguous(), *ctx.saved_tensors, *needs)
        return *as_needed(gradients, ctx.dtypes, needs), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T.

    Products and result are in autocast's dtype under autocast, else in that of x. The gradient of
    the weight is summed in fp32 (fp64 for fp64).

    Args:
        x: (B, M, D).
        weight: (D_out, D).

    Returns:
        (B, M, D_out), contiguous.

    Raises:
        ValueError: naming the argument whose shape or device is not as above.

    Source: torch.nn.functional.linear.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, M, D), got {tuple(x.shape)}")
    check_weight("weight", weight, "D_out", x.shape[-1], x.device)
    return apply(_Linear, x, weight, product_dtype(x))
