"""hierarchical_merge, forward and backward: its products' FLOPs against those of cuBLAS alone.

As a layer of the configuration calls it under autocast: narrow levels, each with a branch, and fp32
weights. FLOPs are those of products at each level's own rate.
"""

import torch

from benchmarks import shapes
from benchmarks.benchmark import Benchmark
from benchmarks.products import SETS, measure_floor, measure_sets, table
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE, autocast, copies
from shtx_kernels import reference

OPS = ours("hierarchical_merge") | {"cublas": None}
BENCHMARK = Benchmark((*OPS,), (table("hierarchical_merge", "every level's at its own rate"),))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def draw(sizes: list[tuple], J: int, D_out: int):
    """Levels (B, M, D) of these sizes, branches and weights; gradients of the outputs."""
    D, (B, N, _) = sum(d for _, _, d in sizes), sizes[0]
    weights = randn(D), randn(J, D) * D**-0.5, randn(J), randn(D_out, J) * J**-0.5, randn(D_out)
    rows = [randn(*size, dtype=DTYPE) for size in 2 * sizes]  # levels, then branches
    douts = [*map(torch.randn_like, rows[: len(sizes)]), randn(B, N, D_out, dtype=DTYPE)]
    return [t.requires_grad_() for t in (*weights, *rows)], douts


def bench_hierarchical_merge(benchmark, config, provider):
    config = shapes.configs(DEVICE)[config]
    model = shapes.on_meta(config)
    strides = [level.stride for level in model.levels]
    rows = {stride: config.batch * -(-config.model["seq_len"] // stride) for stride in strides}
    D_out = model.levels[model.predict_hierarchy_index].dim
    J, tokens = 2 * D_out, rows[1]

    widths = dict.fromkeys(strides, 0)
    for level in model.levels:
        widths[level.stride] += level.dim
    products = [(rows[stride], width, J) for stride, width in widths.items()]
    products += [(tokens, J, D_out)]
    sizes = [(config.batch, rows[x.stride] // config.batch, x.dim) for x in model.levels]

    def forward_backward(op, tensors, douts):
        weights, levels = tensors[:5], tensors[5:]
        with autocast():
            rs, merged = op(levels[: len(sizes)], strides, *weights, levels[len(sizes) :])
        return [*rs, merged, *torch.autograd.grad([*rs, merged], tensors, douts)]

    count = min(SETS, copies(sum(4 * B * M * D for B, M, D in sizes)))
    if provider == "cublas":
        measure_floor(benchmark, products, count)
    else:
        op, twin = OPS[provider], reference.hierarchical_merge
        sets = [draw(sizes, J, D_out) for _ in range(count)]
        measure_sets(benchmark, op, twin, products, forward_backward, sets)
