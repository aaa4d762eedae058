"""The MLP, whose first layer has the weights of the norm before it folded in.

Its input y (2, rows, D) is the two normalized halves of every row, which the first layer multiplies
one after the other.
"""

import torch
from torch import Tensor

from .._gelu import gelu_pass, product_gelu, product_gelu_bwd
from .._sums import column_sums
from ..products import add_product, cast, sum_dtype


def fold(folded, first, bias, gamma, beta) -> Tensor:
    """Fill `folded` (2, O, D) with the first layer (O, 2 D) times the norm's weights, and return
    the bias that belongs to it; O is the width of the layer's output.
    """
    first = cast(first, sum_dtype(folded.dtype))
    folded.copy_((first * gamma).unflatten(1, (2, -1)).transpose(0, 1))
    return cast((first * beta).sum(dim=1) + bias, folded.dtype)


def unfold(dfolded, dbias, first, gamma, beta) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the first layer, gamma and beta, given those of `folded` and its bias."""
    first = cast(first, dfolded.dtype)
    dfirst = dfolded.transpose(0, 1).flatten(1)  # for a layer without the norm's weights
    dgamma, dbeta = (dfirst * first).sum(dim=0), (dbias[:, None] * first).sum(dim=0)
    return dfirst * gamma + dbias[:, None] * beta, dgamma, dbeta


def mlp(y, weights, biases, hidden, out):
    """Fill out (rows, D), and `hidden` with the pre-activations of all layers but the last."""
    u = hidden[0] if hidden else out
    torch.addmm(biases[0], y[0], weights[0][0].T, out=u)
    torch.addmm(u, y[1], weights[0][1].T, out=u)
    if not hidden:
        return
    a = gelu_pass(u)
    for weight, bias, u in zip(weights[1:-1], biases[1:-1], hidden[1:], strict=True):
        a = product_gelu(a, weight, u, bias)
    torch.addmm(biases[-1], a, weights[-1].T, out=out)


def mlp_bwd(dout, y, weights, hidden, dweights, dbiases, start) -> Tensor:
    """The gradient of y. Those of weights and biases are written with `start`, else added to."""
    for i in reversed(range(len(weights))):
        dbias = column_sums(dout)
        dbiases[i].copy_(dbias) if start else dbiases[i].add_(dbias)
        if i:
            a, du = product_gelu_bwd(dout, weights[i], hidden[i - 1])
            add_product(dweights[i], dout.T, a, start)
            dout = du
    dy = torch.empty_like(y)
    for half in range(2):
        add_product(dweights[0][half], dout.T, y[half], start)
        torch.mm(dout, weights[0][half], out=dy[half])
    return dy
