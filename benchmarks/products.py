"""Measures ops around matrix products: forward and backward together.

The floor is their products alone, through cuBLAS, on matrices side by side in memory.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.benchmark import Table
from benchmarks.cells import find, number, ratio
from benchmarks.timing import (
    DEVICE,
    DTYPE,
    autocast,
    check_agreement,
    copies,
    graphed,
    median_ms,
    synchronize,
)

SETS = 4  # the most sets of inputs that are timed


def flops(products: list[tuple[int, int, int]]) -> int:
    """Count those of (rows, inner) @ (inner, columns) and both gradients of each."""
    return sum(6 * rows * inner * columns for rows, inner, columns in products)


def floor(products: list[tuple[int, int, int]]) -> Callable:
    new = lambda *shape: torch.randn(shape, dtype=DTYPE, device=DEVICE)
    operands = [(new(rows, k), new(n, k), new(rows, n)) for rows, k, n in products]
    return lambda: [(x @ w.T, dy @ w, dy.T @ x) for x, w, dy in operands]


def agree(forward_backward: Callable, op: Callable, reference: Callable):
    """Raise ValueError unless both ops give `forward_backward` the same results."""
    bound = 2e-2 if DTYPE == torch.bfloat16 else 1e-5
    check_agreement(*(forward_backward(fn) for fn in (op, reference)), bound)


def measure(benchmark, provider: str, ops: dict[str, Callable], products, draw: Callable):
    """A row of an op made of `products`, forward and backward under autocast.

    draw: makes the tensors that the op takes, the first of them rows, with gradients, and dy.
    """

    def forward_backward(op, inputs, dy):
        with autocast():
            y = op(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    first = draw()
    count = min(SETS, copies(first[0][0].nbytes))
    if provider == "cublas":
        measure_floor(benchmark, products, count)
    else:
        sets = [first, *(draw() for _ in range(count - 1))]
        op, twin = ops[provider], ops["reference"]
        measure_sets(benchmark, op, twin, products, forward_backward, sets)


def measure_floor(benchmark, products, count: int):
    """A row of the products alone, of `count` sets of matrices."""
    runs = [floor(products) for _ in range(count)]
    benchmark.extra_info |= {"flops": flops(products)} | time_runs(benchmark, runs)


def measure_sets(benchmark, op, reference, products, forward_backward: Callable, sets: list):
    """A row of an op made of `products`, once it agrees with the reference on the first set.

    forward_backward: called with either of them and a set, returns a list of tensors.
    """
    agree(lambda fn: forward_backward(fn, *sets[0]), op, reference)
    runs = [lambda s=s: forward_backward(op, *s) for s in sets]
    row = {"flops": flops(products)} | extra_mib(runs[0])
    benchmark.extra_info |= row | time_runs(benchmark, runs)


def extra_mib(run: Callable[[], list[Tensor]]) -> dict:
    """MiB at the peak of a run beyond what it returns, on a GPU."""
    if DEVICE == "cpu":
        return {}
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(t.nbytes for t in run())
    return {"extra_mib": (torch.cuda.max_memory_allocated() - before - kept) / 2**20}


def time_runs(benchmark, runs: list[Callable], graph: bool = True) -> dict:
    """Milliseconds of one of the runs, on a GPU all of them in one CUDA graph, if wanted."""
    times = median_ms(benchmark, *([graphed(runs)] if graph else runs))
    return {"ms": sum(times) / len(runs)}


def table(op: str, of: str, shape: str | None = None) -> Table:
    """The table of an op, whose products through cuBLAS are those `of` what is said here.

    shape: the form of a row's `shape`; None where it has a `config` instead.
    """
    title = f"{op}, forward and backward; cublas: its products alone, {of}"
    return Table(title, partial(line, shape))


def line(shape: str | None, row: dict, rows: list[dict], results: dict) -> dict:
    ms, floor = row.get("ms"), find(rows, row, "cublas").get("ms")
    return {
        f"shape {shape}" if shape else "config": row.get("shape" if shape else "config", "-"),
        "provider": row["provider"],
        "fwd + bwd (us)": number(ms and ms * 1e3),
        "rate (TFLOP/s)": number(ratio(row.get("flops"), ms and ms * 1e9)),
        "of the rate of cublas (%)": number(ratio(floor and floor * 100, ms)),
        "extra memory (MiB)": number(row.get("extra_mib")),
        "over fused (x)": number(ratio(ms, find(rows, row, "fused").get("ms"))),
    }
