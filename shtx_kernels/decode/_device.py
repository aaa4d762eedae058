"""What the ops of one token share: rings, levels of one launch, normalizing a row, waiting.

A launch does a stage for all levels: programs START[i] to START[i + 1] - 1 are level i's, and what
is said of levels comes in tuples. The kernels of a token are short, and each needs what the one
before it wrote: on Hopper they are launched ahead, fetch their weights, and wait for it then
(programmatic dependent launch).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
def normalize(x, gamma_ptr, beta_ptr, offs, D: tl.constexpr, NORM: tl.constexpr):
    """A row x of D channels, zero elsewhere."""
    if NORM is not None:
        gamma = tl.load(gamma_ptr + offs, mask=offs < D, other=0.0).to(x.dtype)
        if NORM == "layer":
            x = tl.where(offs < D, x - tl.sum(x, axis=0) / D, 0.0)
            beta = tl.load(beta_ptr + offs, mask=offs < D, other=0.0).to(x.dtype)
            x = x / tl.sqrt(tl.sum(x * x, axis=0) / D + 1e-5) * gamma + beta
        else:
            x = x * (D**0.5 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=0)), 1e-12)) * gamma
    return x


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    return x


def ring_of(ring: Tensor) -> tuple[int, int, int]:
    """Slots, and the distances of sequences and of slots."""
    return ring.shape[1], ring.stride(0), ring.stride(1)


def accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def starts(programs: list[int]) -> tuple[int, ...]:
    return tuple(sum(programs[:i]) for i in range(len(programs) + 1))


def ahead() -> dict:
    """Launch options."""
    pdl = False
    if not triton.knobs.runtime.interpret:
        target = triton.runtime.driver.active.get_current_target()
        pdl = target.backend == "cuda" and target.arch >= 90
    return dict(AHEAD=pdl, launch_pdl=pdl) if pdl else dict(AHEAD=False)
