"""norm_token_shift, bound by memory: its bytes against those of a copy.

forward    reads x, branch    writes r, y       (without a branch: reads x, writes y)
backward   reads r, dr, dy    writes dx, and dbranch if its dtype is another
                              (without a branch: reads x, dy, writes dx)
"""

import pytest
import torch

from benchmarks.benchmark import Benchmark
from benchmarks.passes import table, time_copy, time_op
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE
from shtx_kernels import reference


def liger(x, gamma, **_):
    """Liger's RMSNorm; it adds 1e-12 to the mean square where ours clamps the norm."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # a peer, not a dependency

    eps, offset, all_fp32, in_place = 1e-12, 0.0, "gemma", False
    return x, LigerRMSNormFunction.apply(x, gamma, eps, offset, all_fp32, in_place)


OPS = ours("norm_token_shift") | {"liger": liger}
BENCHMARK = Benchmark(
    (*OPS, "copy"), (table("norm_token_shift", "B x M x D"),), peers={"liger": "liger_kernel"}
)

PLAIN = "rms, no shift, no branch"  # all that Liger has
# norm, branch and shift, dtype of x; the first is what a block calls under autocast
VARIANTS = {
    "rms, fp32 stream": ("rms", True, torch.float32),
    "rms": ("rms", True, DTYPE),
    PLAIN: ("rms", False, DTYPE),
    "layer, no shift": ("layer", False, DTYPE),
}


@pytest.mark.parametrize("variant", VARIANTS)
def bench_norm_token_shift(benchmark, shape, variant, provider):
    if provider == "liger" and variant != PLAIN:
        pytest.skip("Liger has no such norm")
    _, B, M, D, dilation = shape
    norm, has_branch, dtype = VARIANTS[variant]
    keywords = dict(norm=norm, dilation=dilation if has_branch else 0, dtype=DTYPE)
    wide, narrow = dtype.itemsize, DTYPE.itemsize
    if has_branch:
        forward, backward = 2 * wide + 2 * narrow, 3 * wide + narrow + narrow * (wide != narrow)
    else:
        forward, backward = 2 * narrow, 3 * narrow
    forward_bytes, backward_bytes = forward * B * M * D, backward * B * M * D

    def make():
        leaf = lambda *size, dtype: torch.randn(
            size, dtype=dtype, device=DEVICE, requires_grad=True
        )
        x, gamma = leaf(B, M, D, dtype=dtype), leaf(D, dtype=torch.float32)
        if has_branch:
            return x, gamma, leaf(B, M, D, dtype=DTYPE)
        return (x, gamma, leaf(D, dtype=torch.float32)) if norm == "layer" else (x, gamma)

    def call(op, x, gamma, other=None):
        if has_branch:
            return op(x, gamma, branch=other, **keywords)
        return op(x, gamma, beta=other, **keywords)[1:]

    if provider == "copy":
        forward_ms, backward_ms = time_copy(benchmark, forward_bytes, backward_bytes)
    else:
        forward_ms, backward_ms = time_op(
            benchmark,
            lambda *inputs: call(OPS[provider], *inputs),
            lambda *inputs: call(reference.norm_token_shift, *inputs),
            make,
        )
    benchmark.extra_info |= {
        "forward_ms": forward_ms,
        "forward_bytes": forward_bytes,
        "backward_ms": backward_ms,
        "backward_bytes": backward_bytes,
    }
