"""The distance of a level's latents from those that an MLP predicts, R tokens in a row.

    z_0[t] = h[t],  z_r[t] = z_(r - 1)[t] + mlp(layer_norm([z_(r - 1)[t] ; summaries[t + r]]))
    l_r[t] = distance(z_r[t], h[t + r])
    sum_r = sum over valid[t + r] of steps[r] exp(-decay (l_1[t] + ... + l_(r - 1)[t])) l_r[t]

for the K = M - R tokens t of a sequence that have R tokens after them. The r-th step is rollout r,
with one row for each such token. The one idea: halves stay halves. The norm reads its two halves in
two places and leaves two matrices, its weights are folded into the first layer, and cuBLAS adds up
that layer's products of both halves: no row of 2 D numbers is written, in forward or in backward.
The norm's weights get their gradients from that of the folded layer. One kernel makes the residual,
a row's loss, the weight of that, and their gradients. GELU is a part of its product if that is
faster (_gelu.py). Reference: reference.next_latent_loss
"""

from math import prod

import torch
from torch import Tensor

from .._autograd import apply, first_order
from .._register import register
from .._rows import MAX_D, contiguous_rows
from ..products import cast, narrow, product_dtype, sum_dtype
from .kernels import DISTANCES, Rollout, programs
from .mlp import fold, mlp, mlp_bwd, unfold


def _new_outputs(weights, h, steps, dtype) -> tuple:
    """Uninitialised: the sums, and everything that backward needs."""
    (B, M, D), R = h.shape, steps.shape[0]
    rows, acc = B * max(0, M - R), sum_dtype(h.dtype)
    new = lambda *shape, dtype: h.new_empty(shape, dtype=dtype)
    return (
        new(R, dtype=acc),
        new(2, weights[0].shape[0], D, dtype=dtype),  # the first layer with the norm folded in
        new(R, 2, rows, D, dtype=dtype),  # y: the input of the MLP
        new(R, rows, D, dtype=dtype),  # out: its output
        new(R - 1, rows, D, dtype=acc),  # all latents but the first and the last
        new(R, 2, rows, dtype=acc),  # statistics of the norm
        new(R - 1, rows, dtype=acc),  # past: the sum of a row's losses so far
        # hidden: the pre-activations of all layers but the last
        [new(rows, w.shape[0], dtype=dtype) for _ in range(R) for w in weights[:-1]],
    )


def _decay(decay: float | None, past: Tensor) -> Tensor | None:
    """The decay as a tensor, None if no row is weighted by its past."""
    return None if decay is None or not len(past) else past.new_full((), decay)


def _rollout(r, h, summaries, latents) -> Rollout:
    """Rollout r, from 0 on: it starts from h, or from the latents of the one before."""
    B, R = len(h), len(latents) + 1
    z = latents[r - 1].unflatten(0, (B, -1)) if r else h
    return Rollout(z, summaries, h, R, r + 1)


def _next_latent_loss_fwd(
    weights, biases, gamma, beta, h, summaries, valid, steps, kind, decay, dtype
):
    outputs = _new_outputs(weights, h, steps, dtype)
    sums, folded, y, out, latents, stats, past, hidden = outputs
    bias = fold(folded, weights[0], biases[0], gamma, beta)
    rows, D = out.shape[1:]
    if not rows:
        sums.zero_()
        return outputs
    weights, biases = [folded, *weights[1:]], [bias, *biases[1:]]
    R, inner, decay = len(steps), len(weights) - 1, _decay(decay, past)
    partial = sums.new_empty(R, programs(rows, D))
    for r in range(R):
        rollout = _rollout(r, h, summaries, latents)
        rollout.norm(y[r], stats[r])
        mlp(y[r], weights, biases, hidden[r * inner : (r + 1) * inner], out[r])
        before = past[r - 1] if r and decay is not None else None
        kept = (latents[r], past[r]) if r < R - 1 else None
        rollout.step(kind, out[r], valid, steps, decay, before, kept, partial[r])
    torch.sum(partial, dim=1, out=sums)
    return outputs


def _new_gradients(weights, gamma, h, summaries, needs_dsummaries) -> tuple:
    """Uninitialised gradients, empty if not needed; those of weights are in the dtype of sums."""
    new = lambda shape: h.new_empty(shape, dtype=sum_dtype(h.dtype))
    dsummaries = summaries.new_empty(summaries.shape if needs_dsummaries else 0)
    dweights, dbiases = [new(w.shape) for w in weights], [new(w.shape[0]) for w in weights]
    return h.new_empty(h.shape), dsummaries, new(gamma.shape), new(gamma.shape), dweights, dbiases


def _next_latent_loss_bwd(
    weights, dsums, gamma, beta, h, summaries, valid, steps, kind, decay,
    folded, y, out, latents, stats, past, hidden, needs_dsummaries,
):  # fmt: skip
    gradients = _new_gradients(weights, gamma, h, summaries, needs_dsummaries)
    dh, dsummaries, dgamma, dbeta, dweights, dbiases = gradients
    (R, rows, D), B, K, dtype, acc = out.shape, len(h), h.shape[1] - len(steps), y.dtype, past.dtype
    if not rows:
        for t in (dh, dsummaries, dgamma, dbeta, *dweights, *dbiases):
            t.zero_()
        return gradients
    inner, decay = len(weights) - 1, _decay(decay, past)
    layers, dlayers = [folded, *weights[1:]], [y.new_empty(folded.shape, dtype=acc), *dweights[1:]]
    total = later = None
    if needs_dsummaries:  # the gradients of several rollouts are added up in `total`
        total = dsummaries if R == 1 else torch.empty_like(dsummaries, dtype=acc)
        total[:, :R].zero_()
    for r in reversed(range(R)):
        rollout, start = _rollout(r, h, summaries, latents), r == R - 1
        dnext = out.new_empty(rows, D, dtype=h.dtype if R == 1 else acc)
        dout = dnext if dtype == dnext.dtype else torch.empty_like(dnext, dtype=dtype)
        before = past[r - 1] if r and decay is not None else None
        weighting = valid, steps, decay, before, dsums
        rollout.step_bwd(kind, out[r], *weighting, later, dnext, dout)
        kept = hidden[r * inner : (r + 1) * inner]
        dy = mlp_bwd(dout, y[r], layers, kept, dlayers, dbiases, start)
        dz = latents.new_empty(B, K, D) if r else dh
        rollout.norm_bwd(stats[r], dy, dnext, dz, total, add=not start)
        later = dz
    dh[:, K:].zero_()
    if needs_dsummaries and R > 1:
        dsummaries.copy_(total)
    unfolded = unfold(dlayers[0], dbiases[0], weights[0], gamma, beta)
    for t, value in zip((dweights[0], dgamma, dbeta), unfolded, strict=True):
        t.copy_(value)
    return gradients


def _product_flops(weights, h, steps) -> int:
    """FLOPs of the MLP in all rollouts."""
    B, M, _ = h
    return 2 * steps[0] * B * max(0, M - steps[0]) * sum(map(prod, weights))


_forward = register(
    "next_latent_loss",
    "(Tensor[] weights, Tensor[] biases, Tensor gamma, Tensor beta, Tensor h, Tensor summaries,"
    " Tensor valid, Tensor steps, int kind, float? decay, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _next_latent_loss_fwd,
    fake=lambda weights, biases, gamma, beta, h, summaries, valid, steps, kind, decay, dtype: (
        _new_outputs(weights, h, steps, dtype)
    ),
    flops=lambda weights, biases, gamma, beta, h, summaries, valid, steps, *_, **__: _product_flops(
        weights, h, steps
    ),
)
_backward = register(
    "next_latent_loss_bwd",
    "(Tensor[] weights, Tensor dsums, Tensor gamma, Tensor beta, Tensor h, Tensor summaries,"
    " Tensor valid, Tensor steps, int kind, float? decay, Tensor folded, Tensor y, Tensor out,"
    " Tensor latents, Tensor stats, Tensor past, Tensor[] hidden, bool needs_dsummaries)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    _next_latent_loss_bwd,
    fake=lambda weights, dsums, gamma, beta, h, summaries, *others: _new_gradients(
        weights, gamma, h, summaries, others[-1]
    ),
    flops=lambda weights, dsums, gamma, beta, h, summaries, valid, steps, *_, **__: (
        2 * _product_flops(weights, h, steps)
    ),
)


class _NextLatentLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, summaries, valid, gamma, beta, steps, kind, decay, dtype, *layers):
        ctx.dtypes = [t.dtype for t in (gamma, beta, *layers)]
        first, bias, *inner = layers
        # the first layer is not narrowed yet, as the norm's weights are folded into it before
        weights = [first, *(narrow(w, dtype) for w in inner[::2])]
        biases = [bias, *(cast(b, dtype) for b in inner[1::2])]
        inputs = gamma, beta, h, summaries, valid, steps
        sums, *kept, hidden = _forward(weights, biases, *inputs, kind, decay, dtype)
        ctx.save_for_backward(*inputs, *kept, *weights, *hidden)
        ctx.options, ctx.layers = (kind, decay), len(weights)
        return sums

    @staticmethod
    @first_order("next_latent_loss")
    def backward(ctx, dsums):
        inputs, kept, rest = (ctx.saved_tensors[a:b] for a, b in ((0, 6), (6, 12), (12, None)))
        weights, hidden = list(rest[: ctx.layers]), list(rest[ctx.layers :])
        needs = ctx.needs_input_grad
        dh, dsummaries, *ofs, dweights, dbiases = _backward(
            weights, dsums.contiguous(), *inputs, *ctx.options, *kept, hidden, needs[1]
        )
        of_layers = [t for pair in zip(dweights, dbiases, strict=True) for t in pair]
        ofs = [cast(t, dtype) for t, dtype in zip([*ofs, *of_layers], ctx.dtypes, strict=True)]
        gradients = dh, dsummaries, None, *ofs[:2], None, None, None, None, *ofs[2:]
        return tuple(t if need else None for t, need in zip(gradients, needs, strict=True))


def _check(name: str, t: Tensor, shape: tuple, like: Tensor):
    if t.shape != shape or t.device != like.device:
        raise ValueError(
            f"{name} must be {tuple(shape)} on {like.device}, got {tuple(t.shape)} on {t.device}"
        )


def next_latent_loss(
    h: Tensor,
    summaries: Tensor,
    valid: Tensor,
    norm: tuple[Tensor, Tensor],
    layers: list[tuple[Tensor, Tensor]],
    steps: Tensor,
    *,
    distance: str = "mse_and_cosine_sim",
    decay: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum up how far z_r = z_(r - 1) + mlp(layer_norm([z_(r - 1) ; summaries[t + r]])), from
    z_0 = h[t] on, is from h[t + r], for r of 1 to R.

    Rows add up as `reference.rollouts` says; h gets gradients through z_0 alone, and the weights of
    steps and of rows get none. Products are in autocast's dtype under autocast; latents, norms,
    distances and sums are fp32 (fp64 for fp64).

    Args:
        h: (B, M, D), a level; D at most 8192, all may be strided.
        summaries: (B, M, D), a summary of the tokens of each level token.
        valid: (B, M) bool, whether the prediction of a token counts.
        norm: gamma and beta (2 D,); eps is 1e-5.
        layers: weight (out, in) and bias (out,) of each layer of the MLP, from 2 D to D, with GELU
            by erf in between.
        steps: (R,), the weights of the steps, R at least 1.
        distance: "mse", "smooth_l1" (beta 1), or "mse_and_cosine_sim", which is 0.1 of the first
            plus 0.9 (1 - cosine); the first two are means over D.
        decay: how fast a row loses weight with its losses so far; None: not at all.

    Returns:
        The sums (R,) and the counts (R,) of valid rows, one of each for every step; 0 with zero
        gradients if M is at most R.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is not as above.

    Source: next latent prediction (NextLat, arXiv 2511.05963), as in
    simple-hierarchical-transformer 0.4.0.
    """
    if h.ndim != 3:
        raise ValueError(f"h must be (B, M, D), got {tuple(h.shape)}")
    B, M, D = h.shape
    if not 1 <= D <= MAX_D:
        raise ValueError(f"h must have a width D of 1 to {MAX_D}, got {D}")
    _check("summaries", summaries, h.shape, h)
    _check("valid", valid, (B, M), h)
    if valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}")
    for name, t in zip(("gamma", "beta"), norm, strict=True):
        _check(f"{name} of norm", t, (2 * D,), h)
    if not layers:
        raise ValueError("layers must be at least one weight and bias, got none")
    width = 2 * D
    for i, (weight, bias) in enumerate(layers):
        if weight.ndim != 2 or not len(weight):
            raise ValueError(
                f"weight of layer {i} must be (out, {width}), got {tuple(weight.shape)}"
            )
        out = D if i == len(layers) - 1 else len(weight)
        _check(f"weight of layer {i}", weight, (out, width), h)
        _check(f"bias of layer {i}", bias, (out,), h)
        width = out
    if steps.ndim != 1 or not len(steps) or steps.device != h.device or steps.requires_grad:
        raise ValueError(
            f"steps must be (R,) on {h.device}, R at least 1, without a gradient,"
            f" got {tuple(steps.shape)} on {steps.device}, requires_grad={steps.requires_grad}"
        )
    if distance not in DISTANCES:
        names = ", ".join(map(repr, DISTANCES))
        raise ValueError(f"distance must be one of {names}, got {distance!r}")
    decay = None if decay is None else float(decay)
    R, flat = len(steps), [t for layer in layers for t in layer]
    args = (
        contiguous_rows(h),
        contiguous_rows(summaries),
        valid.contiguous(),
        *norm,
        steps.contiguous(),
    )
    options = DISTANCES.index(distance), decay, product_dtype(h)
    sums = apply(_NextLatentLoss, *args, *options, *flat)
    K = max(0, M - R)
    return sums, torch.stack([valid[:, r : r + K].sum() for r in range(1, R + 1)])
