"""feed_forward, forward and backward: its products' FLOPs against those of cuBLAS alone.

As most blocks of the configuration call it under autocast: narrow rows, fp32 weights, a slope that
is kept.
"""

from functools import partial

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.products import measure, table
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE

MULT = 4  # inner width over D

OPS = {
    provider: op and partial(op, keep_slope=True) for provider, op in ours("feed_forward").items()
} | {"cublas": None}
BENCHMARK = Benchmark((*OPS,), (table("feed_forward", "an inner layer of 4 D", "B x M x D"),))


def bench_feed_forward(benchmark, shape, provider):
    _, B, M, D, _ = shape

    def draw():
        x = torch.randn(B, M, D, dtype=DTYPE, device=DEVICE)
        w_in = torch.randn(MULT * D, D, device=DEVICE) * D**-0.5
        w_out = torch.randn(D, MULT * D, device=DEVICE) * (MULT * D) ** -0.5
        return [t.requires_grad_() for t in (x, w_in, w_out)], torch.randn_like(x)

    products = [(B * M, D, MULT * D), (B * M, MULT * D, D)]
    measure(benchmark, provider, OPS, products, draw)
