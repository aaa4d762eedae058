"""Two linear layers without bias, GELU between them.

    u = x W_in^T,  y = gelu(u) W_out^T        gelu(u) = u Phi(u), Phi the normal distribution's

F, the width of u, is the number of rows of W_in. The one idea: u alone is kept for backward, which
reads it once, both for gelu(u), which the gradient of W_out needs, and for the gradient of u; or
else gelu(u) and the slope of gelu at u, which leaves backward one number to read and one to write.
On Hopper, GELU of 16-bit numbers is a part of the product that makes its argument or the gradient
of its result; elsewhere it is a pass over memory between products of cuBLAS. All other products are
cuBLAS's. Reference: reference.feed_forward
"""

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._autograd import apply, as_needed, first_order
from ._gelu import new_kept, product_gelu, product_gelu_bwd
from ._register import register
from ._weights import check_weight
from .products import add_product, cast, narrow, product_dtype, sum_dtype


def _feed_forward_fwd(x, w_in, w_out, keep_slope):
    kept = new_kept(x, w_in, w_out, keep_slope)
    a = product_gelu(x.flatten(0, 1), w_in, kept)
    return linear(a.unflatten(0, x.shape[:2]), w_out), kept


def _feed_forward_bwd(dy, x, kept, w_in, w_out, needs_dx, needs_dw_in, needs_dw_out):
    gradients = _new_gradients(x, w_in, w_out, needs_dx, needs_dw_in, needs_dw_out)
    dx, dw_in, dw_out = gradients
    x, dy = x.flatten(0, 1), dy.flatten(0, 1)
    a, du = product_gelu_bwd(dy, w_out, kept)
    if needs_dw_out:
        add_product(dw_out, dy.T, a, start=True)
    if needs_dw_in:
        add_product(dw_in, du.T, x, start=True)
    if needs_dx:
        torch.mm(du, w_in, out=dx.flatten(0, 1))
    return gradients


def _fake_fwd(x, w_in, w_out, keep_slope):
    y = x.new_empty(*x.shape[:2], w_out.shape[0])
    return y, new_kept(x, w_in, w_out, keep_slope)


def _new_gradients(x, w_in, w_out, needs_dx, needs_dw_in, needs_dw_out):
    """Uninitialised gradients, empty if not needed; those of weights are in the dtype of sums."""
    acc = sum_dtype(x.dtype)
    dx = x.new_empty(*(x.shape if needs_dx else (0,)))
    dw_in = x.new_empty(*(w_in.shape if needs_dw_in else (0,)), dtype=acc)
    return dx, dw_in, x.new_empty(*(w_out.shape if needs_dw_out else (0,)), dtype=acc)


def _bwd_flops(dy, x, kept, w_in, w_out, needs_dx, needs_dw_in, needs_dw_out, **_) -> int:
    of_in, of_out = (needs_dx + needs_dw_in) * prod(w_in), (1 + needs_dw_out) * prod(w_out)
    return 2 * kept[-2] * (of_in + of_out)


_forward = register(
    "feed_forward",
    "(Tensor x, Tensor w_in, Tensor w_out, bool keep_slope) -> (Tensor, Tensor)",
    _feed_forward_fwd,
    fake=_fake_fwd,
    flops=lambda x, w_in, w_out, *_, **__: 2 * x[0] * x[1] * (prod(w_in) + prod(w_out)),
)
_backward = register(
    "feed_forward_bwd",
    "(Tensor dy, Tensor x, Tensor kept, Tensor w_in, Tensor w_out, bool needs_dx, bool needs_dw_in,"
    " bool needs_dw_out) -> (Tensor, Tensor, Tensor)",
    _feed_forward_bwd,
    fake=lambda dy, x, kept, *arguments: _new_gradients(x, *arguments),
    flops=_bwd_flops,
)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, w_out, dtype, keep_slope):
        ctx.dtypes = x.dtype, w_in.dtype, w_out.dtype
        x = cast(x, dtype).contiguous()
        w_in, w_out = (narrow(w, dtype).contiguous() for w in (w_in, w_out))
        y, kept = _forward(x, w_in, w_out, keep_slope)
        ctx.save_for_backward(x, kept, w_in, w_out)
        return y

    @staticmethod
    @first_order("feed_forward")
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:3]
        gradients = _backward(dy.contiguous(), *ctx.saved_tensors, *needs)
        return *as_needed(gradients, ctx.dtypes, needs), None, None


def feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, *, keep_slope: bool = False) -> Tensor:
    """gelu(x w_in^T) w_out^T, with GELU by erf.

    Products and result are in autocast's dtype under autocast, else in that of x. GELU is computed
    and weight gradients are summed in fp32 (fp64 for fp64).

    Args:
        x: (B, M, D).
        w_in: (F, D).
        w_out: (D_out, F).
        keep_slope: keep 2 F numbers of each row for backward, and not F, where that makes it
            faster: in products of 16-bit numbers on Hopper, for D of 512 or more.

    Returns:
        (B, M, D_out), contiguous.

    Raises:
        ValueError: naming the argument whose shape or device is not as above.

    Source: Vaswani et al. 2017, arXiv 1706.03762, with GELU (Hendrycks and Gimpel 2016, arXiv
    1606.08415), as in simple-hierarchical-transformer.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, M, D), got {tuple(x.shape)}")
    check_weight("w_in", w_in, "F", x.shape[-1], x.device)
    check_weight("w_out", w_out, "D_out", w_in.shape[0], x.device)
    return apply(_FeedForward, x, w_in, w_out, product_dtype(x), keep_slope)
