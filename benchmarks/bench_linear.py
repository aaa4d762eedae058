"""linear, forward and backward, at the width of queries, keys and values: FLOPs against cuBLAS's.

As a block of the configuration calls it under autocast: narrow rows, an fp32 weight.
"""

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.products import measure, table
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE

OPS = ours("linear") | {"cublas": None}
BENCHMARK = Benchmark((*OPS,), (table("linear", "to a width of 3 D", "B x M x D"),))


def bench_linear(benchmark, shape, provider):
    _, B, M, D, _ = shape

    def draw():
        x = torch.randn(B, M, D, dtype=DTYPE, device=DEVICE, requires_grad=True)
        weight = torch.randn(3 * D, D, device=DEVICE, requires_grad=True)
        return [x, weight], torch.randn(B, M, 3 * D, dtype=DTYPE, device=DEVICE)

    measure(benchmark, provider, OPS, [(B * M, D, 3 * D)], draw)
