"""The gate of SiLU, of numbers in registers."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(u, RESULT: tl.constexpr):
    """1 / (1 + exp(-u)), for a result of that dtype.

    Where that has 16 bits, by a reciprocal root: within 4e-7, in half the instructions. Of some
    passes they, not the bytes, are the bound.
    """
    if RESULT.primitive_bitwidth == 16:
        root = tl.rsqrt(1.0 + tl.exp2(u * -1.4426950408889634))
        return root * root
    return tl.sigmoid(u)
