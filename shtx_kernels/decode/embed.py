"""Sums of rows of tables, which the last ids choose.

    out[m] = activation(bias + sum over taps t of table[t, ids[position - (C - 1) + t]])

It is the first op of a token, and the only one that is not launched ahead: so all others can read
the position before they wait.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..decode_arguments import Lookup
from ..launch import accumulator, cdiv, launch, next_power_of_2
from ._device import activate, rings_of, row_of, starts

ELEMENTS = 2048  # elements of tables that a program reads


@triton.jit
def _embed_kernel(
    position_ptr, ids_ptr, history_ptr, table_ptrs, bias_ptrs, out_ptrs,
    HISTORY: tl.constexpr, START: tl.constexpr, C: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, RINGS: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every program has some channels of one sequence at one level."""
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + b)
    token_id = tl.load(ids_ptr + b)
    if pid == 0:
        tl.store(row_of(history_ptr, b, position, HISTORY, 0), token_id)
    for i in tl.static_range(len(table_ptrs)):
        if (pid >= START[i]) & (pid < START[i + 1]):
            if position % STRIDE[i] == 0:
                tap = tl.arange(0, C[i])
                at = position - (C[i] - 1) + tap
                past = row_of(history_ptr, b, at, HISTORY, 0)
                ids = tl.load(past, mask=(at >= 0) & (at < position), other=0)
                ids = tl.where(at == position, token_id, ids)
                offs = (pid - START[i]) * BLOCK_D[i] + tl.arange(0, BLOCK_D[i])
                rows = table_ptrs[i] + (tap.to(tl.int64) * V[i] + ids)[:, None] * D[i]
                mask = (at >= 0)[:, None] & (offs < D[i])[None, :]
                y = tl.sum(tl.load(rows + offs[None, :], mask=mask, other=0.0).to(ACC), axis=0)
                if bias_ptrs[i] is not None:
                    y += tl.load(bias_ptrs[i] + offs, mask=offs < D[i], other=0.0).to(ACC)
                out = row_of(out_ptrs[i], b, position // STRIDE[i], RINGS, i) + offs
                tl.store(out, activate(y, ACTIVATION, i), mask=offs < D[i])


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
    launch(
        _embed_kernel, (START[-1], len(position)),
        position, ids, history, table, bias, out,
        HISTORY=rings_of([history]), START=START, C=C, V=V, D=D, STRIDE=stride,
        ACTIVATION=activation, RINGS=rings_of(out), BLOCK_D=BLOCK_D,
        ACC=accumulator(table[0].dtype),
    )  # fmt: skip
