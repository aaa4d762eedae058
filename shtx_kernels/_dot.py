"""The product of two tiles."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, ACC: tl.constexpr, IP: tl.constexpr):
    """acc + a b in ACC; acc is a tile or None, IP the precision of products of fp32 numbers.

    The interpreter multiplies bf16 numbers as if their bits were integers, so they are widened
    there.
    """
    if INTERPRETED:
        if a.dtype == tl.bfloat16:
            a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=IP, out_dtype=ACC)
