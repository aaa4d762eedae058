"""out[m] = layer_norm(x[m]); each program has one row."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..decode_arguments import Norm
from ..launch import accumulator, launch, next_power_of_2
from ._device import ahead, normalize, program, rings_of, row_of, wait


class Levels(NamedTuple):
    """The constants that the kernel is compiled for, one entry per level."""

    D: tuple[int, ...]  # channels
    STRIDE: tuple[int, ...]  # tokens per token of the level
    RINGS_X: tuple
    RINGS_O: tuple
    BLOCK_D: tuple[int, ...]  # channels of a tile, at least D


@triton.jit
def _norm_kernel(
    position_ptr, x_ptrs, gamma_ptrs, beta_ptrs, out_ptrs,
    LEVELS: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every program has one level of one sequence."""
    pid, b, position = program(position_ptr)
    RINGS_X: tl.constexpr = LEVELS.RINGS_X
    RINGS_O: tl.constexpr = LEVELS.RINGS_O
    wait(AHEAD)
    for i in tl.static_range(len(x_ptrs)):
        if (pid == i) & (position % LEVELS.STRIDE[i] == 0):
            token, offs = position // LEVELS.STRIDE[i], tl.arange(0, LEVELS.BLOCK_D[i])
            mask = offs < LEVELS.D[i]
            x_row = row_of(x_ptrs[i], b, token, RINGS_X, i)
            x = tl.load(x_row + offs, mask=mask, other=0.0).to(ACC)
            gamma = tl.load(gamma_ptrs[i] + offs, mask=mask, other=0.0).to(ACC)
            beta = tl.load(beta_ptrs[i] + offs, mask=mask, other=0.0).to(ACC)
            y = normalize(x, mask, LEVELS.D[i], "layer") * gamma + beta
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
    levels = Levels(D, stride, rings_of(x), rings_of(out), tuple(map(next_power_of_2, D)))
    launch(
        _norm_kernel, (len(norms), len(position)),
        position, x, gamma, beta, out,
        LEVELS=levels, ACC=accumulator(x[0].dtype), **ahead(position.device),
    )  # fmt: skip
