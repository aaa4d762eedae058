"""The gate of SiLU, for numbers in registers."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(u, RESULT: tl.constexpr):
    """1 / (1 + exp(-u)), for a result of dtype RESULT.

    For 16 bits it is the square of a reciprocal root, within 4e-7 and in half the instructions,
    which some passes need more time for than for their bytes.
    """
    if RESULT.primitive_bitwidth == 16:
        root = tl.rsqrt(1.0 + tl.exp2(u * -1.4426950408889634))
        return root * root
    return tl.sigmoid(u)
