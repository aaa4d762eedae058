"""hierarchical_ar_loss: all of it, and its kernel alone, bound by memory, against a copy.

forward    reads p, h
backward   reads p, h    writes dp, dh
"""

import pytest
import torch

from benchmarks.benchmark import Benchmark
from benchmarks.passes import table, time_copy, time_op
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE, autocast, copies, graphed, median_ms
from shtx_kernels import reference

OPS = ours("hierarchical_ar_loss")
BENCHMARK = Benchmark((*OPS, "copy"), (table("hierarchical_ar_loss", "B x M x D"),))
ALL, KERNEL = "products and all", "kernel alone"


def time_kernel(benchmark, B: int, M: int, D: int) -> list[float]:
    from shtx_kernels.hierarchical_ar_loss import launch_pairs

    total = torch.ones((), device=DEVICE)
    draw = lambda: torch.randn(B * M, D, dtype=DTYPE, device=DEVICE)
    sets = [(draw(), draw()) for _ in range(copies(2 * B * M * D * DTYPE.itemsize))]
    forward = graphed([lambda s=s: launch_pairs(*s, M) for s in sets])
    backward = graphed([lambda s=s: launch_pairs(*s, M, total) for s in sets])
    return [ms / len(sets) for ms in median_ms(benchmark, forward, backward)]


def time_all(benchmark, op, B: int, M: int, D: int) -> tuple[float, float]:
    def make():
        h = torch.randn(B, M, D, dtype=DTYPE, device=DEVICE)
        weight, bias = torch.randn(D, D, device=DEVICE) * D**-0.5, torch.randn(D, device=DEVICE)
        return [t.requires_grad_() for t in (h, weight, bias)]

    def call(op, *inputs):
        with autocast():
            return [op(*inputs)]

    return time_op(
        benchmark,
        lambda *inputs: call(op, *inputs),
        lambda *inputs: call(reference.hierarchical_ar_loss, *inputs),
        make,
    )


@pytest.mark.parametrize("variant", [ALL, KERNEL])
def bench_hierarchical_ar_loss(benchmark, shape, variant, provider):
    _, B, M, D, _ = shape
    if variant == KERNEL:
        if provider not in ("fused", "copy"):
            pytest.skip("a kernel of the fused op")
        sizes = {"forward_bytes": 2, "backward_bytes": 4}
        sizes = {name: times * B * M * D * DTYPE.itemsize for name, times in sizes.items()}
        benchmark.extra_info |= sizes
        if provider == "copy":
            times = time_copy(benchmark, *sizes.values())
        else:
            times = time_kernel(benchmark, B, M, D)
    elif provider == "copy":
        pytest.skip("a copy makes no products")
    else:
        times = time_all(benchmark, OPS[provider], B, M, D)
    benchmark.extra_info |= dict(zip(("forward_ms", "backward_ms"), times, strict=True))
