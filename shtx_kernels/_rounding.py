"""Square roots and quotients in full precision: Triton's own of fp32 numbers are approximate."""

import triton
import triton.language as tl


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)
