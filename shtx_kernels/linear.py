"""A linear layer without bias.

    y = x W^T

The one idea: the gradient of W is summed, and leaves the product, in fp32: PyTorch rounds it to the
dtype of the product under autocast and widens it again. The products are cuBLAS's.
Reference: reference.linear
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._products import add_product, narrow, product_dtype


def _new_gradients(x, weight, needs_dx, needs_dweight) -> tuple[Tensor, Tensor]:
    """Uninitialised, that of the weight in the dtype of sums; empty where not needed."""
    acc = torch.promote_types(x.dtype, torch.float32)
    dweight = x.new_empty(weight.shape if needs_dweight else 0, dtype=acc)
    return x.new_empty(x.shape if needs_dx else 0), dweight


def _linear(x, weight):
    y = x.new_empty(*x.shape[:2], len(weight))
    with torch.autocast(x.device.type, enabled=False):
        torch.mm(x.flatten(0, 1), weight.T, out=y.flatten(0, 1))
    return y


def _linear_bwd(dy, x, weight, needs_dx, needs_dweight):
    dx, dweight = _new_gradients(x, weight, needs_dx, needs_dweight)
    dy = dy.flatten(0, 1)
    with torch.autocast(x.device.type, enabled=False):
        if needs_dx:
            torch.mm(dy, weight, out=dx.flatten(0, 1))
        if needs_dweight:
            add_product(dweight, dy.T, x.flatten(0, 1), start=True)
    return dx, dweight


torch.library.define("shtx::linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.define(
    "shtx::linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, bool needs_dx, bool needs_dweight) -> (Tensor, Tensor)",
)
torch.library.impl("shtx::linear", ("CPU", "CUDA"), _linear)
torch.library.impl("shtx::linear_bwd", ("CPU", "CUDA"), _linear_bwd)


@torch.library.register_fake("shtx::linear")
def _(x, weight):
    return x.new_empty(*x.shape[:2], len(weight))


@torch.library.register_fake("shtx::linear_bwd")
def _(dy, x, weight, needs_dx, needs_dweight):
    return _new_gradients(x, weight, needs_dx, needs_dweight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, dtype):
        ctx.dtypes = x.dtype, weight.dtype
        x, weight = x.to(dtype).contiguous(), narrow(weight, dtype).contiguous()
        ctx.save_for_backward(x, weight)
        return torch.ops.shtx.linear.default(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:2]
        gradients = torch.ops.shtx.linear_bwd.default(dy.contiguous(), *ctx.saved_tensors, *needs)
        triples = zip(gradients, ctx.dtypes, needs, strict=True)
        return *(g.to(dtype) if needed else None for g, dtype, needed in triples), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T.

    Under autocast, products and what is returned are in its dtype, else in that of x. The gradient
    of the weight is summed in fp32 (fp64 for fp64).

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
    D = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != D or weight.device != x.device:
        raise ValueError(
            f"weight must be (D_out, {D}) on {x.device},"
            f" got {tuple(weight.shape)} on {weight.device}"
        )
    return _Linear.apply(x, weight, product_dtype(x))
