"""feed_forward, forward and backward: its products' FLOPs against those of cuBLAS alone.

As a block of the configuration calls it under autocast: narrow rows, fp32 weights.
"""

import torch

import shtx_kernels
from benchmarks.products import agree, extra_mib, floor, flops, time_runs
from benchmarks.timing import DEVICE, DTYPE, autocast, copies
from shtx_kernels import reference

MULT = 4  # inner width over D

OPS = {
    "fused": getattr(shtx_kernels, "feed_forward", None),
    "reference": reference.feed_forward,
    "reference-compiled": torch.compile(reference.feed_forward),
    "cublas": None,
}


def bench_feed_forward(benchmark, shape, provider):
    _, B, M, D, _ = shape
    products = [(B * M, D, MULT * D), (B * M, MULT * D, D)]
    count = min(4, copies(B * M * D * DTYPE.itemsize))

    def draw():
        x = torch.randn(B, M, D, dtype=DTYPE, device=DEVICE)
        w_in = torch.randn(MULT * D, D, device=DEVICE) * D**-0.5
        w_out = torch.randn(D, MULT * D, device=DEVICE) * (MULT * D) ** -0.5
        return [t.requires_grad_() for t in (x, w_in, w_out)], torch.randn_like(x)

    def forward_backward(op, inputs, dy):
        with autocast():
            y = op(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    row = {"flops": flops(products)}
    if provider == "cublas":
        runs = [floor(products) for _ in range(count)]
    else:
        op, sets = OPS[provider], [draw() for _ in range(count)]
        agree(lambda fn: forward_backward(fn, *sets[0]), op, reference.feed_forward)
        runs = [lambda s=s: forward_backward(op, *s) for s in sets]
        row |= extra_mib(runs[0])
    benchmark.extra_info |= row | time_runs(benchmark, runs)
