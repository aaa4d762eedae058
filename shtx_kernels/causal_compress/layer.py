"""Both ways to the pre-activations u share this: everything from u on, and registration."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .._register import register
from ..launch import cdiv
from ..products import add_product, cast, sum_dtype
from .kernels import activate, activate_bwd


def finish(y, source, ids, b_conv, w_out, b_out, stride: int, taps: int, windows: int):
    """Fill y (B, M, D_out) from the source of the pre-activations."""
    a = activate(source, ids, b_conv, y.shape[1], stride, taps, windows)
    torch.addmm(cast(b_out, a.dtype), a, w_out.T, out=y.flatten(0, 1))


def finish_bwd(
    source, ids, b_conv, w_out, dy, stride: int, taps: int, windows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, b_conv and w_out, given that of y, dy (B, M, D_out)."""
    M, dy = dy.shape[1], dy.flatten(0, 1)
    a = dy.new_empty(dy.shape[0], w_out.shape[1])
    torch.mm(dy, w_out, out=a)  # the gradient of a, which the kernel replaces by a
    du, db_conv = activate_bwd(source, ids, b_conv, a, M, stride, taps, windows)
    dw_out = w_out.new_empty(w_out.shape, dtype=sum_dtype(w_out.dtype))
    add_product(dw_out, dy.T, a, start=True)
    return du, db_conv, dw_out


def new_gradients(embedding, b_conv, w_out, taps: int) -> tuple[Tensor, ...]:
    """Uninitialised gradients of embedding, w_conv, b_conv, w_out and b_out."""
    J, D, acc = b_conv.shape[0], embedding.shape[1], sum_dtype(embedding.dtype)
    shapes = embedding.shape, (J, D, taps), (J,), w_out.shape, w_out.shape[:1]
    return tuple(embedding.new_empty(shape, dtype=acc) for shape in shapes)


def _flops(ids, w_conv, w_out, stride: int) -> int:
    """FLOPs of the convolution and the linear layer."""
    return 2 * ids[0] * cdiv(ids[1], stride) * (prod(w_conv) + prod(w_out))


def register_way(
    name: str, forward: Callable, backward: Callable, outputs: Callable, tap_dim: int
) -> tuple[Callable, Callable]:
    """Register the ops of one way to u.

    Args:
        name: the name of the forward op.
        forward: returns y, the source of u, and the weight with the dimension of taps at tap_dim.
        backward: takes these, and returns the gradients of embedding, w_conv, b_conv, w_out, b_out.
        outputs: takes the arguments of forward, and returns its outputs uninitialised.
        tap_dim: 0 or 1.
    """
    inputs = "Tensor b_conv, Tensor w_out"
    return register(
        name,
        f"(Tensor ids, Tensor embedding, Tensor w_conv, {inputs}, Tensor b_out, int stride)"
        " -> (Tensor, Tensor, Tensor)",
        forward,
        outputs,
        flops=lambda ids, embedding, w_conv, b_conv, w_out, b_out, stride, **_: _flops(
            ids, w_conv, w_out, stride
        ),
    ), register(
        f"{name}_bwd",
        f"(Tensor ids, Tensor embedding, Tensor taps, {inputs}, Tensor source, Tensor dy,"
        " int stride) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward,
        fake=lambda ids, embedding, taps, b_conv, w_out, *_: new_gradients(
            embedding, b_conv, w_out, taps.shape[tap_dim]
        ),
        flops=lambda ids, embedding, taps, b_conv, w_out, source, dy, stride, **_: (
            2 * _flops(ids, taps, w_out, stride)
        ),
    )
