"""token_embedding, forward and backward, of every configuration's uncompressed level.

As the model calls it under autocast: fp32 weights. FLOPs are those of the linear layer, where there
is one, made of every token.
"""

import torch

from benchmarks import shapes
from benchmarks.benchmark import Benchmark
from benchmarks.products import SETS, measure_sets, table
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, autocast
from shtx_kernels import reference

OPS = ours("token_embedding")
BENCHMARK = Benchmark((*OPS,), (table("token_embedding", "of every token"),))


def bench_token_embedding(benchmark, config, provider):
    model, B, N, V, D = shapes.tokens(config, DEVICE)
    D_out = next(level.dim for level in model.levels if level.compress == 1)

    def draw():
        weights = [torch.randn(V, D, device=DEVICE)]
        if D_out != D:
            weights.append(torch.randn(D_out, D, device=DEVICE) * D**-0.5)
        ids = torch.randint(0, V, (B, N), device=DEVICE)
        return ids, [t.requires_grad_() for t in weights], torch.randn(B, N, D_out, device=DEVICE)

    def forward_backward(op, ids, weights, dy):
        with autocast():
            y = op(ids, *weights)
        return [y, *torch.autograd.grad(y, weights, dy.to(y.dtype))]

    op, twin, sets = OPS[provider], reference.token_embedding, [draw() for _ in range(SETS)]
    products = [(B * N, D, D_out)] * (D_out != D)
    measure_sets(benchmark, op, twin, products, forward_backward, sets)
