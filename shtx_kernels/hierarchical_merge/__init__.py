"""Levels merged at each level's own rate.

    r_l[m] = x_l[m] + branch_l[m]                         level l, with a token every s_l
    z_s[m] = sum_l r_l[m] (w_l gamma_l)^T                 over levels of stride s; w_in = [w_l]
    |r[t]|^2 = sum_l |r_l[t // s_l]|^2
    u[t] = sqrt(D) / max(|r[t]|, 1e-12) sum_s z_s[t // s] + b_in
    merged[t] = silu(u[t]) w_out^T + b_out

J is the number of rows of w_in. The one idea: the norm's scale is one number per row, so it
commutes with the product, and so does repeating rows. Hence levels are multiplied before they are
normalized and repeated: levels of one stride are written side by side, for one product with a
weight that has gamma in it. Nothing as wide as all levels is made at token rate for levels with a
stride. The gradient of the weight with gamma in it gives the gradients of both. Products are
cuBLAS's. Reference: reference.hierarchical_merge
"""

from math import prod

import torch
from torch import Tensor

from .._autograd import apply, first_order
from .._register import register
from .._rows import contiguous_rows
from ..products import cast, narrow, product_dtype
from .backward import _hierarchical_merge_bwd, new_gradients
from .forward import _hierarchical_merge_fwd, groups_of, new_outputs


def _fake_fwd(levels, strides, gamma, w_in, b_in, w_out, b_out, branches):
    return new_outputs(levels, strides, w_in, w_out)


def _fake_bwd(
    rs, side_by_side, strides, gamma, w_in, w, b_in, w_out, z, norm, drs, dout, branch_dtype,
    has_dbranches, needs_levels, needs_w_in, needs_w_out,
):  # fmt: skip
    dxs, dbranches = new_gradients(rs, branch_dtype, needs_levels, has_dbranches)
    new = lambda needed, *shape: norm.new_empty(shape if needed else 0)
    J, W = w_in.shape
    dgamma, dw_in, db_in = new(needs_w_in, W), new(needs_w_in, J, W), new(True, J)
    dw_out, db_out = new(needs_w_out, *w_out.shape), new(True, len(w_out))
    return dxs, dbranches, dgamma, dw_in, db_in, dw_out, db_out


def _fwd_flops(levels, strides, gamma, w_in, b_in, w_out, b_out, branches, **_) -> int:
    tokens = min(x[1] * stride for x, stride in zip(levels, strides, strict=True))
    return 2 * levels[0][0] * tokens * (prod(w_in) + prod(w_out))


def _bwd_flops(
    rs, side_by_side, strides, gamma, w_in, w, b_in, w_out, z, norm, drs, dout, branch_dtype,
    has_dbranches, needs_levels, needs_w_in, needs_w_out, **_,
):  # fmt: skip
    of_in, of_out = (needs_levels + needs_w_in) * prod(w_in), (1 + needs_w_out) * prod(w_out)
    return 2 * prod(norm) * (of_in + of_out)


_forward = register(
    "hierarchical_merge",
    "(Tensor[] levels, int[] strides, Tensor gamma, Tensor w_in, Tensor b_in, Tensor w_out,"
    " Tensor b_out, Tensor?[] branches) -> (Tensor[], Tensor, Tensor, Tensor, Tensor)",
    _hierarchical_merge_fwd,
    _fake_fwd,
    _fwd_flops,
)
_backward = register(
    "hierarchical_merge_bwd",
    "(Tensor[] rs, Tensor[] side_by_side, int[] strides, Tensor gamma, Tensor w_in, Tensor w,"
    " Tensor b_in, Tensor w_out, Tensor z, Tensor norm, Tensor?[] drs, Tensor dout,"
    " ScalarType branch_dtype, bool has_dbranches, bool needs_levels, bool needs_w_in,"
    " bool needs_w_out) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor, Tensor, Tensor)",
    _hierarchical_merge_bwd,
    _fake_bwd,
    _bwd_flops,
)


def _apart(side_by_side: list[Tensor], levels, strides) -> list[Tensor]:
    """Each level's part of its group, as a view."""
    parts = {}
    for group, r in zip(groups_of(levels, strides)[1], side_by_side, strict=True):
        parts |= zip(group.levels, r.split(group.widths, dim=-1), strict=True)
    return [parts[level] for level in range(len(levels))]


class _HierarchicalMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, strides, dtype, gamma, w_in, b_in, w_out, b_out, *tensors):
        levels, branches = tensors[: len(strides)], tensors[len(strides) :]
        ctx.dtypes = gamma.dtype, w_in.dtype, b_in.dtype, w_out.dtype, b_out.dtype
        ctx.branch_dtypes = [None if branch is None else branch.dtype for branch in branches]
        ctx.strides = strides
        w_out = narrow(w_out, dtype)
        side_by_side, w, z, norm, merged = _forward(
            levels, strides, gamma, w_in, b_in, w_out, b_out, branches
        )
        rs = _apart(side_by_side, levels, strides)
        ctx.save_for_backward(gamma, w_in, w, b_in, w_out, z, norm, *rs, *side_by_side)
        ctx.set_materialize_grads(False)
        kept = zip(levels, branches, rs, strict=True)
        return *(x if branch is None else r for x, branch, r in kept), merged

    @staticmethod
    @first_order("hierarchical_merge")
    def backward(ctx, *gradients):
        *drs, dout = gradients
        count = len(drs)
        needs, needs_branches = ctx.needs_input_grad, ctx.needs_input_grad[-count:]
        if dout is None:
            pairs = zip(drs, ctx.branch_dtypes, needs_branches, strict=True)
            dbranches = [dr.to(d) if need and dr is not None else None for dr, d, need in pairs]
            return *[None] * 7, *drs, *dbranches
        gamma, w_in, w, b_in, w_out, z, norm, *rest = ctx.saved_tensors
        rs, side_by_side = rest[:count], rest[count:]
        dtype = next(filter(None, ctx.branch_dtypes), rs[0].dtype)
        rows = dout.flatten(0, 1).contiguous()
        has_dbranches = dtype != rs[0].dtype and any(needs_branches)
        dxs, dbranches, *weights = _backward(
            rs, side_by_side, ctx.strides, gamma, w_in, w, b_in, w_out, z, norm,
            [contiguous_rows(dr) for dr in drs], rows, dtype,
            has_dbranches, any(needs[7:]), needs[2] or needs[3], needs[5],
        )  # fmt: skip
        dxs = dxs or [None] * count
        dbranches = dbranches or dxs
        gradients = zip([*weights, *dxs, *dbranches], needs[2:], strict=True)
        gradients = [gradient if needed else None for gradient, needed in gradients]
        weights = zip(gradients[:5], ctx.dtypes, strict=True)
        weights = [None if dw is None else cast(dw, dtype) for dw, dtype in weights]
        return None, None, *weights, *gradients[5:]


def _check(name: str, t: Tensor, shape: tuple, device: torch.device):
    if t.shape != shape or t.stride(-1) != 1 or t.device != device:
        raise ValueError(
            f"{name} must be {tuple(shape)} on {device} with a contiguous last dimension,"
            f" got {tuple(t.shape)} on {t.device}, strides {t.stride()}"
        )


def hierarchical_merge(
    levels: list[Tensor],
    strides: list[int],
    gamma: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    branches: list[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Add branches to levels, and merge all of them at token rate.

    Products and their result are in autocast's dtype under autocast, else in that of the levels.
    Levels are multiplied before they are normalized: in fp16, the products of r, gamma and w_in
    must stay below 65504.

    Args:
        levels: (B, M, D_l) each, of one dtype; D_l contiguous, B and M may be strided.
        strides: for each level, how many tokens one of its tokens stands for.
        gamma: (D,), the norm's weight; D is the sum of all D_l.
        w_in: (J, D).
        b_in: (J,).
        w_out: (D_out, J).
        b_out: (D_out,).
        branches: for each level, a tensor of its shape to be added to it, or None; all of one
            dtype.

    Returns:
        rs: (B, M, D_l) each, level + branch in the dtype of the level; the level itself without a
            branch.
        merged: (B, N, D_out), Linear(silu(Linear(rms_norm(cat of rs)))) with every r repeated
            `stride` times and cut to the shortest, of N tokens.

    Raises:
        ValueError: naming the argument whose shape, strides, dtype, device or value is not as
            above.

    Source: simple-hierarchical-transformer.
    """
    if not levels or len(strides) != len(levels):
        raise ValueError(
            "strides must be one for each of levels, of which there must be some,"
            f" got {len(strides)} for {len(levels)}"
        )
    if min(strides) < 1:
        raise ValueError(f"strides must be at least 1, got {min(strides)}")
    x, B = levels[0], levels[0].shape[0]
    for i, t in enumerate(levels):
        same = t.ndim == 3 and (t.shape[0], t.dtype, t.device) == (B, x.dtype, x.device)
        if not same or t.shape[-1] < 1 or t.stride(-1) != 1:
            raise ValueError(
                f"levels must be (B, M, D) with contiguous D of at least 1, all of the B, dtype and"
                f" device of the first, got {tuple(t.shape)}, {t.dtype} on {t.device}, strides"
                f" {t.stride()} for level {i}"
            )
    J, D, D_out = w_in.shape[0], sum([t.shape[2] for t in levels]), w_out.shape[0]
    if not (J and D_out):
        raise ValueError(f"w_in and w_out must have at least one row, got {J} and {D_out}")
    gamma, w_in, b_in, w_out, b_out = map(contiguous_rows, (gamma, w_in, b_in, w_out, b_out))
    _check("gamma", gamma, (D,), x.device)
    _check("w_in", w_in, (J, D), x.device)
    _check("b_in", b_in, (J,), x.device)
    _check("w_out", w_out, (D_out, J), x.device)
    _check("b_out", b_out, (D_out,), x.device)
    branches = [None] * len(levels) if branches is None else branches
    if len(branches) != len(levels):
        raise ValueError(
            f"branches must be one for each of {len(levels)} levels, got {len(branches)}"
        )
    for i, (t, branch) in enumerate(zip(levels, branches, strict=True)):
        if branch is not None:
            _check(f"branches[{i}]", branch, t.shape, x.device)
    dtypes = {branch.dtype for branch in branches if branch is not None}
    if len(dtypes) > 1:
        raise ValueError(f"branches must be of one dtype, got {sorted(map(str, dtypes))}")
    arguments = tuple(strides), product_dtype(x), gamma, w_in, b_in, w_out, b_out
    *rs, merged = apply(_HierarchicalMerge, *arguments, *levels, *branches)
    return rs, merged
