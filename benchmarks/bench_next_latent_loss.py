"""next_latent_loss, forward and backward: its products' FLOPs against those of cuBLAS alone.

As a level of the configuration calls it under autocast, with the defaults: one rollout, three
layers as wide as the level, narrow rows, fp32 weights.
"""

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.products import measure, table
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE


def bind(op, valid, steps):
    """The op as a function of what has gradients, to the sums."""

    def call(h, summaries, gamma, beta, *layers):
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        return op(h, summaries, valid, (gamma, beta), pairs, steps)[0]

    return call


OF = "three layers, the first of them 2 D wide"
OPS = ours("next_latent_loss") | {"cublas": None}
BENCHMARK = Benchmark((*OPS,), (table("next_latent_loss", OF, "B x M x D"),))


def bench_next_latent_loss(benchmark, shape, provider):
    _, B, M, D, _ = shape
    valid, steps = torch.rand(B, M, device=DEVICE) > 0.1, torch.ones(1, device=DEVICE)
    sizes = [(2 * D, D), (D, D), (D, D)]

    def draw():
        inputs = [torch.randn(B, M, D, dtype=DTYPE, device=DEVICE) for _ in range(2)]
        inputs += [torch.ones(2 * D, device=DEVICE), torch.zeros(2 * D, device=DEVICE)]
        for inner, out in sizes:
            inputs.append(torch.randn(out, inner, device=DEVICE) * inner**-0.5)
            inputs.append(torch.randn(out, device=DEVICE))
        return [t.requires_grad_() for t in inputs], torch.ones(1, device=DEVICE)

    products = [(B * (M - 1), inner, out) for inner, out in sizes]
    ops = {name: op and bind(op, valid, steps) for name, op in OPS.items()}
    measure(benchmark, provider, ops, products, draw)
