"""chunk_summary, forward and backward, of all levels of every configuration.

As the model calls it under autocast: fp32 weights, and an embedding without a gradient. FLOPs are
those of the linear layers, where widths differ, made of every token of their levels.
"""

import torch

from benchmarks import shapes
from benchmarks.benchmark import Benchmark
from benchmarks.products import SETS, measure_sets, table
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, autocast
from shtx_kernels import reference

OPS = ours("chunk_summary")
BENCHMARK = Benchmark((*OPS,), (table("chunk_summary", "of every token"),))


def bench_chunk_summary(benchmark, config, provider):
    model, B, N, V, D = shapes.tokens(config, DEVICE)

    def draw():
        levels = []
        for level in model.levels:
            sizes, d = dict(compress=level.compress, stride=level.stride), level.dim
            shapes = [(d, D), (d,)] if d != D else []
            weights = [torch.randn(s, device=DEVICE).mul_(D**-0.5) for s in shapes]
            dy = torch.randn(B, -(-N // level.stride), d, device=DEVICE)
            levels.append((sizes, [t.requires_grad_() for t in weights], dy))
        return torch.randint(0, V, (B, N), device=DEVICE), torch.randn(V, D, device=DEVICE), levels

    def forward_backward(op, ids, embedding, levels):
        results = []
        for sizes, weights, dy in levels:
            with autocast():
                y = op(ids, embedding, *weights, **sizes)
            results.append(y)
            if weights:
                results += torch.autograd.grad(y, weights, dy.to(y.dtype))
        return results

    op, twin, sets = OPS[provider], reference.chunk_summary, [draw() for _ in range(SETS)]
    products = [(B * -(-N // x.stride), D, x.dim) for x in model.levels if x.dim != D]
    measure_sets(benchmark, op, twin, products, forward_backward, sets)
