"""causal_compress, forward and backward, of random ids.

FLOPs are those of the products that compress every token: the convolution's and the one after it,
each with both of its gradients. `products` is the fused op without its table, and `cublas` the
products alone, of windows that lie in memory side by side; the second of them is timed by itself,
too, for what is left of an op without it.
"""

from importlib import import_module
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import find, number
from benchmarks.products import agree, extra_mib, floor, flops, table, time_runs
from benchmarks.providers import ours
from benchmarks.timing import DEVICE, DTYPE, autocast, graphed, median_ms
from shtx_kernels import reference


class Case(NamedTuple):
    B: int
    N: int
    V: int
    D: int
    D_out: int
    C: int
    stride: int

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        return {"shape": " x ".join(map(str, self))}

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(rows, inner, columns) of both."""
        rows = self.B * -(-self.N // self.stride)
        return [(rows, self.C * self.D, 4 * self.D), (rows, 4 * self.D, self.D_out)]


CASES = {
    "cuda": [  # levels of configurations B, C, D and A
        Case(32, 1024, 256, 1024, 256, 2, 1),
        Case(32, 1024, 256, 1024, 512, 4, 1),
        Case(32, 1024, 256, 1024, 1024, 16, 8),
        Case(8, 2048, 256, 1024, 1024, 2, 1),
        Case(1, 16384, 256, 512, 512, 16, 1),
        Case(4, 2048, 20000, 512, 512, 2, 1),
        Case(4, 2048, 20000, 512, 512, 8, 1),
    ],
    "cpu": [Case(2, 64, 8, 16, 8, 4, 1)],
}[DEVICE]


def products(*args, stride):
    page = import_module("shtx_kernels.causal_compress")
    with patch.object(page, "uses_table", lambda *shape: False):
        return page.causal_compress(*args, stride=stride)


OF = "of every token, windows side by side in memory"
COMMON = table("causal_compress", OF, "B x N x V x D x D_out x C x stride")


def line(row: dict, rows: list[dict], results: dict) -> dict:
    ms, second = row.get("ms"), find(rows, row, "cublas").get("second_ms")
    left = number((ms - second) * 1e3 if ms and second else None)
    return COMMON.line(row, rows, results) | {"less cublas's second product (us)": left}


OPS = ours("causal_compress") | {"products": products, "cublas": None}
BENCHMARK = Benchmark((*OPS,), (Table(COMMON.title, line),), fused=("products",))


def draw(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    D, J = case.D, 4 * case.D
    shapes = (case.V, D), (J, D, case.C), (J,), (case.D_out, J, 1), (case.D_out,)
    scales = 1, (D * case.C) ** -0.5, 1, J**-0.5, 1
    weights = [
        torch.randn(shape, device=DEVICE).mul_(scale).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return torch.randint(0, case.V, (case.B, case.N), device=DEVICE), weights


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_causal_compress(benchmark, case, provider):
    row = {"flops": flops(case.products)}
    if provider == "cublas":
        runs = (graphed([floor(products)]) for products in (case.products, case.products[1:]))
        row["ms"], row["second_ms"] = median_ms(benchmark, *runs)
    else:
        ids, weights = draw(case)
        rows = -(-case.N // case.stride)
        dy = torch.randn(case.B, rows, case.D_out, dtype=DTYPE, device=DEVICE)

        def forward_backward(op):
            with autocast():
                y = op(ids, *weights, stride=case.stride)
            return [y, *torch.autograd.grad(y, weights, dy)]

        agree(forward_backward, OPS[provider], reference.causal_compress)
        run = lambda: forward_backward(OPS[provider])
        row |= extra_mib(run) | time_runs(benchmark, [run])
    benchmark.extra_info |= row
