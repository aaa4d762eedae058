"""Sums of rows of tables, which the last ids choose.

    out[m] = activation(bias + sum over taps t of table[t, ids[position - (C - 1) + t]])

It is the first op of a token, and the only one that is not launched ahead: so all others can read
the position before they wait.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..decode_arguments import Lookup
from ..launch import accumulator, cdiv, launch, next_power_of_2
from ._device import activate, program, rings_of, row_of, starts

ELEMENTS = 2048  # elements of tables that a program reads


class Levels(NamedTuple):
    """The constants that the kernel is compiled for, one entry per level."""

    START: tuple[int, ...]  # first programs
    C: tuple[int, ...]  # taps of the table
    V: tuple[int, ...]  # ids of the table
    D: tuple[int, ...]  # channels
    STRIDE: tuple[int, ...]  # tokens per token of the level
    ACTIVATION: tuple[str | None, ...]
    RINGS: tuple  # those of `out`
    BLOCK_D: tuple[int, ...]  # channels of a program


@triton.jit
def embed_channels(
    history_ptr, table_ptr, bias_ptr, out_ptr, token_id, pid, b, position,
    HISTORY: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Some channels of one sequence at level I."""
    C: tl.constexpr = LEVELS.C[I]
    D: tl.constexpr = LEVELS.D[I]
    BLOCK_D: tl.constexpr = LEVELS.BLOCK_D[I]
    ACTIVATION: tl.constexpr = LEVELS.ACTIVATION[I]
    RINGS: tl.constexpr = LEVELS.RINGS
    tap = tl.arange(0, C)
    at = position - (C - 1) + tap
    past = row_of(history_ptr, b, at, HISTORY, 0)
    ids = tl.load(past, mask=(at >= 0) & (at < position), other=0)
    ids = tl.where(at == position, token_id, ids)
    offs = pid * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = table_ptr + (tap.to(tl.int64) * LEVELS.V[I] + ids)[:, None] * D
    mask = (at >= 0)[:, None] & (offs < D)[None, :]
    y = tl.sum(tl.load(rows + offs[None, :], mask=mask, other=0.0).to(ACC), axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=offs < D, other=0.0).to(ACC)
    out = row_of(out_ptr, b, position // LEVELS.STRIDE[I], RINGS, I) + offs
    tl.store(out, activate(y, ACTIVATION), mask=offs < D)


@triton.jit
def _embed_kernel(
    position_ptr, ids_ptr, history_ptr, table_ptrs, bias_ptrs, out_ptrs,
    HISTORY: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every program has some channels of one sequence at one level."""
    pid, b, position = program(position_ptr)
    token_id = tl.load(ids_ptr + b)
    if pid == 0:
        tl.store(row_of(history_ptr, b, position, HISTORY, 0), token_id)
    for i in tl.static_range(len(table_ptrs)):
        if (pid >= LEVELS.START[i]) & (pid < LEVELS.START[i + 1]):
            if position % LEVELS.STRIDE[i] == 0:
                embed_channels(
                    history_ptr, table_ptrs[i], bias_ptrs[i], out_ptrs[i], token_id,
                    pid - LEVELS.START[i], b, position, HISTORY, LEVELS, i, ACC,
                )  # fmt: skip


def embed(position: Tensor, ids: Tensor, history: Tensor, lookups: list[Lookup]) -> None:
    """out = activation(bias + sum over taps t of table[t, id of tap t]), for ids up to each
    position.

    Args:
        position: (B,) int64. ids: (B,) int64, the ids at `position`. history: ring (B, C) int64 of
        earlier ids, into which `ids` are put. Taps before the start add
            nothing.
        lookups: one per level; the number of a table's taps is a power of two.

    Source: simple-hierarchical-transformer, one token at a time.
    """
    if not len(position):
        return
    table, bias, activation, out, stride = zip(*lookups, strict=True)
    C, V, D = zip(*(t.shape for t in table), strict=True)
    wide = [next_power_of_2(d) for d in D]
    BLOCK_D = tuple(min(d, ELEMENTS // c) for d, c in zip(wide, C, strict=True))
    START = starts([cdiv(d, n) for d, n in zip(D, BLOCK_D, strict=True)])
    levels = Levels(START, C, V, D, stride, activation, rings_of(out), BLOCK_D)
    launch(
        _embed_kernel, (START[-1], len(position)),
        position, ids, history, table, bias, out,
        HISTORY=rings_of([history]), LEVELS=levels, ACC=accumulator(table[0].dtype),
    )  # fmt: skip
