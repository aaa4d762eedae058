"""Measures the losses behind a linear layer.

Time is that of forward and backward together, from narrow rows and fp32 weights under autocast, as
the model calls them. The floor is three products through cuBLAS: logits, and both gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import products
from benchmarks.benchmark import Table
from benchmarks.timing import DEVICE, DTYPE, autocast, copies


class Case(NamedTuple):
    T: int  # rows
    D: int
    V: int
    C: int = 1  # targets, each with a vocabulary

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        return {"shape": " x ".join(map(str, self))}

    @property
    def flops(self) -> int:
        return 6 * self.T * self.D * self.V * self.C


def table(op: str) -> Table:
    return products.table(op, "with all logits in memory", "T x D x V x C")


def draw(case: Case) -> tuple[torch.Tensor, ...]:
    """x (1, T, D), weight (C V, D), ids (1, T) above 0."""
    T, D, V, C = case
    x = torch.randn(1, T, D, dtype=DTYPE, device=DEVICE, requires_grad=True)
    weight = torch.randn(C * V, D, device=DEVICE).mul_(D**-0.5).requires_grad_()
    return x, weight, torch.randint(1, V, (1, T), device=DEVICE)


def floor(x, weight):
    """The products, in the dtype of x."""
    w = weight.detach().to(x.dtype)
    rows = x.detach().flatten(0, 1)
    logits = torch.empty(len(rows), len(w), dtype=x.dtype, device=x.device)

    def run():
        torch.mm(rows, w.T, out=logits)
        return [logits @ w, logits.T @ rows]

    return run


def time_loss(benchmark, case: Case, op: Callable | None, reference: Callable, graph: bool = True):
    """Milliseconds and extra MiB of `op(x, weight, ids)`, once it agrees; of the floor for None.

    graph: whether to time CUDA graphs; a peer that synchronises can be in none.
    """

    def forward_backward(op, x, weight, ids):
        with autocast():
            loss = op(x, weight, ids)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    sets = [draw(case) for _ in range(min(products.SETS, copies(case.T * case.D * DTYPE.itemsize)))]
    row = {"flops": case.flops}
    if op is None:
        runs = [floor(x, weight) for x, weight, _ in sets]
    else:
        few = draw(Case(min(case.T, 1024), *case[1:]))
        products.agree(lambda fn: forward_backward(fn, *few), op, reference)
        runs = [lambda s=s: forward_backward(op, *s) for s in sets]
        if DEVICE == "cuda":
            runs[0]()  # the first of this size
        row |= products.extra_mib(runs[0])
    benchmark.extra_info |= row | products.time_runs(benchmark, runs, graph)
