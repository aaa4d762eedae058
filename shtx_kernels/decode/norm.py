"""out[m] = layer_norm(x[m]); each program has one row."""

import triton
import triton.language as tl
from torch import Tensor

from ..decode_arguments import Norm
from ..launch import accumulator, launch, next_power_of_2
from ._device import ahead, normalize, rings_of, row_of, wait


@triton.jit
def _norm_kernel(
    position_ptr, x_ptrs, gamma_ptrs, beta_ptrs, out_ptrs,
    D: tl.constexpr, STRIDE: tl.constexpr, RINGS_X: tl.constexpr, RINGS_O: tl.constexpr,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + b)
    wait(AHEAD)
    for i in tl.static_range(len(x_ptrs)):
        if (pid == i) & (position % STRIDE[i] == 0):
            token, offs = position // STRIDE[i], tl.arange(0, BLOCK_D[i])
            mask = offs < D[i]
            x_row = row_of(x_ptrs[i], b, token, RINGS_X, i)
            x = tl.load(x_row + offs, mask=mask, other=0.0).to(ACC)
            gamma = tl.load(gamma_ptrs[i] + offs, mask=mask, other=0.0).to(ACC)
            beta = tl.load(beta_ptrs[i] + offs, mask=mask, other=0.0).to(ACC)
            y = normalize(x, gamma, beta, mask, D[i], NORM, i)
            tl.store(row_of(out_ptrs[i], b, token, RINGS_O, i) + offs, y, mask=mask)


def norm(position: Tensor, norms: list[Norm]) -> None:
    """out = layer_norm(x), for the level token that each position makes.

    Args:
        position: (B,) int64.
        norms: one per level.

    Source: simple-hierarchical-transformer, one token at a time.
    """
    if not norms or not len(position):
        return
    x, gamma, beta, out, stride = zip(*norms, strict=True)
    D = tuple(t.shape[-1] for t in x)
    launch(
        _norm_kernel, (len(norms), len(position)),
        position, x, gamma, beta, out,
        D=D, STRIDE=stride, RINGS_X=rings_of(x), RINGS_O=rings_of(out),
        NORM=("layer",) * len(norms),
        BLOCK_D=tuple(map(next_power_of_2, D)),
        ACC=accumulator(x[0].dtype), **ahead(position.device),
    )  # fmt: skip
