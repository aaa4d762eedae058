"""The ops of one token share rings, the levels of one launch, and launching ahead.

A launch serves all levels: programs START[i] to START[i + 1] - 1 belong to level i. Pointers are
tuples with one entry per level, and so is every field of LEVELS, which has all sizes that a kernel
is compiled for; I is the level. RINGS[I] has the slots of a level's ring, and how far apart in
memory its sequences and its slots are.

The kernels are short, and each needs what the one before it wrote. So on Hopper they are launched
ahead: they fetch weights and everything else that is older than this token, and then wait
(programmatic dependent launch).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .._target import capability
from ..launch import next_power_of_2

MAX_ROWS = 64  # sequences of a tile


@triton.jit
def program(position_ptr):
    """The number of a program among those of its sequence, the sequence, and its position."""
    pid = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    return pid, b, tl.load(position_ptr + b)


@triton.jit
def wait(AHEAD: tl.constexpr):
    """Wait for all earlier launches (griddepcontrol.wait), and let the next launch start and wait
    in turn. Every program has to call this.
    """
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch(w_ptrs, mask, AHEAD: tl.constexpr):
    """Bring the lines at `w_ptrs` into the L2 cache while the launch before is at work."""
    if AHEAD:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r", [w_ptrs.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def row_of(ptr, b, token, RINGS: tl.constexpr, I: tl.constexpr):
    """Pointer to ring I's row for `token`; `token` may be negative, down to -slots."""
    slots: tl.constexpr = RINGS[I][0]
    stride_b: tl.constexpr = RINGS[I][1]
    stride_s: tl.constexpr = RINGS[I][2]
    return ptr + b * stride_b + (token + slots) % slots * stride_s


@triton.jit
def normalize(x, gamma, beta, mask, K: tl.constexpr, NORM: tl.constexpr):
    """A row x of K channels, normalized if NORM is not None; x is zero outside of `mask`."""
    if NORM == "layer":
        x = tl.where(mask, x - tl.sum(x, axis=0) / K, 0.0)
        x = x / tl.sqrt(tl.sum(x * x, axis=0) / K + 1e-5) * gamma + beta
    elif NORM == "rms":
        x = x * (K**0.5 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=0)), 1e-12)) * gamma
    return x


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x after the activation, if ACTIVATION is not None."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


def rings_of(rings: Sequence[Tensor | None]) -> tuple:
    """Return RINGS, None for rings that are None."""
    return tuple(r if r is None else (r.shape[1], r.stride(0), r.stride(1)) for r in rings)


def starts(programs: list[int]) -> tuple[int, ...]:
    """The first program of each level, and the number of all programs."""
    return tuple(sum(programs[:i]) for i in range(len(programs) + 1))


def ahead(device: torch.device, wanted: bool = True) -> dict:
    """The options of a launch that is to start ahead, if so `wanted`, where the GPU can do that."""
    hopper = capability(device) >= 90 and not triton.knobs.runtime.interpret
    return dict(AHEAD=True, launch_pdl=True) if hopper and wanted else dict(AHEAD=False)


def options_of_rows(rows: int, weight: Tensor, deep: dict, shallow: dict) -> dict:
    """The options of a product of so many rows with `weight`: BLOCK_B, a tile and whether it starts
    ahead.

    Args:
        deep: the tile of 16-bit numbers on Hopper and later. It has more stages, so that more of a
            weight is on its way.
        shallow: the tile where that takes too much shared memory.
    """
    block = min(MAX_ROWS, max(16, next_power_of_2(rows)))
    fits = capability(weight.device) >= 90 and weight.itemsize <= 2
    # Tiles of fewer rows took up to 2.3 times as long ahead on an H200, and full ones 7% to 18%
    # less; why the former wait is not known.
    start = ahead(weight.device, block == MAX_ROWS)
    return dict(BLOCK_B=block) | (deep if fits else shallow) | start
