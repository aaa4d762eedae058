"""norm_token_shift, bound by memory: its bytes against those of a copy.

forward    reads x, branch    writes r, y       (without a branch: reads x, writes y)
backward   reads r, dr, dy    writes dx, and dbranch if its dtype is another
"""

import pytest
import torch

import shtx_kernels
from benchmarks.timing import DEVICE, DTYPE, time_op
from shtx_kernels import reference

OPS = {
    "fused": getattr(shtx_kernels, "norm_token_shift", None),
    "reference": reference.norm_token_shift,
    "reference-compiled": torch.compile(reference.norm_token_shift),
}

# norm, branch and shift, dtype of x; the first is what a block calls under autocast
VARIANTS = {
    "rms, fp32 stream": ("rms", True, torch.float32),
    "rms": ("rms", True, DTYPE),
    "layer, no shift": ("layer", False, DTYPE),
}


@pytest.mark.parametrize("variant", VARIANTS)
def bench_norm_token_shift(benchmark, shape, variant, provider):
    _, B, M, D, dilation = shape
    norm, has_branch, dtype = VARIANTS[variant]
    keywords = dict(norm=norm, dilation=dilation if has_branch else 0, dtype=DTYPE)

    def make():
        leaf = lambda *size, dtype: torch.randn(
            size, dtype=dtype, device=DEVICE, requires_grad=True
        )
        x, gamma = leaf(B, M, D, dtype=dtype), leaf(D, dtype=torch.float32)
        if has_branch:
            return x, gamma, leaf(B, M, D, dtype=DTYPE)
        return x, gamma, leaf(D, dtype=torch.float32)

    def call(op, x, gamma, other):
        if has_branch:
            return op(x, gamma, branch=other, **keywords)
        return op(x, gamma, beta=other, **keywords)[1:]

    forward_ms, backward_ms = time_op(
        benchmark,
        lambda *inputs: call(OPS[provider], *inputs),
        lambda *inputs: call(reference.norm_token_shift, *inputs),
        make,
    )
    wide, narrow = dtype.itemsize, DTYPE.itemsize
    if has_branch:
        forward, backward = 2 * wide + 2 * narrow, 3 * wide + narrow + narrow * (wide != narrow)
    else:
        forward, backward = 2 * narrow, 3 * narrow
    benchmark.extra_info |= {
        "forward_ms": forward_ms,
        "forward_bytes": forward * B * M * D,
        "backward_ms": backward_ms,
        "backward_bytes": backward * B * M * D,
    }
