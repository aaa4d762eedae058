"""token_embedding, forward and backward, of every configuration's uncompressed level.

As the model calls it under autocast: fp32 weights. FLOPs are those of the linear layer, where there
is one, made of every token.
"""

import torch

from benchmarks import shapes
from benchmarks.benchmark import Benchmark
from benchmarks.products import agree, extra_mib, flops, table, time_runs
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, autocast
from shtx_kernels import reference

OPS = ours("token_embedding")
BENCHMARK = Benchmark((*OPS,), (table("token_embedding", "of every token"),))
SETS = 4


def bench_token_embedding(benchmark, config, provider):
    config = shapes.configs(DEVICE)[config]
    model, V = shapes.on_meta(config), config.model["num_tokens"]
    D, B, N = max(model.dims), config.batch, config.model["seq_len"]
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

    op, sets = OPS[provider], [draw() for _ in range(SETS)]
    agree(lambda fn: forward_backward(fn, *sets[0]), op, reference.token_embedding)
    runs = [lambda s=s: forward_backward(op, *s) for s in sets]
    row = {"flops": flops([(B * N, D, D_out)] * (D_out != D))} | extra_mib(runs[0])
    benchmark.extra_info |= row | time_runs(benchmark, runs)
