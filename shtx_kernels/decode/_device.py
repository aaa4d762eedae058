"""What the ops of one token share: rings, levels of one launch, launching ahead.

A launch does a stage for all levels: programs START[i] to START[i + 1] - 1 are level i's, and what
is said of levels comes in tuples. The kernels of one sequence are short, and each needs what the
one before it wrote: on Hopper they are launched ahead, fetch weights and all else that is older
than this token, and wait then (programmatic dependent launch).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .._target import capability


@triton.jit
def wait(AHEAD: tl.constexpr):
    """Until all that was launched before is done; every program must. Whoever comes next may be
    launched, and wait too.
    """
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def row_of(ptr, b, token, RINGS: tl.constexpr, I: tl.constexpr):
    """Where ring I has the row of a token, of at least minus its slots."""
    slots: tl.constexpr = RINGS[I][0]
    return ptr + b * RINGS[I][1] + (token + slots) % slots * RINGS[I][2]


@triton.jit
def normalize(x, gamma, beta, mask, K: tl.constexpr, NORM: tl.constexpr, I: tl.constexpr):
    """A row of K channels, zero elsewhere."""
    if NORM[I] == "layer":
        x = tl.where(mask, x - tl.sum(x, axis=0) / K, 0.0)
        x = x / tl.sqrt(tl.sum(x * x, axis=0) / K + 1e-5) * gamma + beta
    elif NORM[I] == "rms":
        x = x * (K**0.5 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=0)), 1e-12)) * gamma
    return x


@triton.jit
def activate(x, ACTIVATIONS: tl.constexpr, I: tl.constexpr):
    if ACTIVATIONS[I] == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATIONS[I] == "silu":
        x = x * tl.sigmoid(x)
    return x


def rings_of(rings: Sequence[Tensor | None]) -> tuple:
    """Of each, as far as there is one: slots, and the distances of sequences and of slots."""
    return tuple(r if r is None else (r.shape[1], r.stride(0), r.stride(1)) for r in rings)


def starts(programs: list[int]) -> tuple[int, ...]:
    return tuple(sum(programs[:i]) for i in range(len(programs) + 1))


def ahead(device: torch.device) -> dict:
    """Launch options."""
    hopper = capability(device) >= 90 and not triton.knobs.runtime.interpret
    return dict(AHEAD=True, launch_pdl=True) if hopper else dict(AHEAD=False)
