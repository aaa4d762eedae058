"""feed_forward, forward and backward: its products' FLOPs against those of cuBLAS alone.

As a block of the configuration calls it under autocast: narrow rows, fp32 weights.
"""

import torch

import shtx_kernels
from benchmarks.products import measure
from benchmarks.timing import DEVICE, DTYPE
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

    def draw():
        x = torch.randn(B, M, D, dtype=DTYPE, device=DEVICE)
        w_in = torch.randn(MULT * D, D, device=DEVICE) * D**-0.5
        w_out = torch.randn(D, MULT * D, device=DEVICE) * (MULT * D) ** -0.5
        return [t.requires_grad_() for t in (x, w_in, w_out)], torch.randn_like(x)

    products = [(B * M, D, MULT * D), (B * M, MULT * D, D)]
    measure(benchmark, provider, OPS, products, draw)
