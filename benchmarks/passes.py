"""Measures ops bound by memory in both directions: their bytes against those of a copy."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.benchmark import Table
from benchmarks.cells import find, number, ratio
from benchmarks.timing import DEVICE, DTYPE, check_agreement, copies, graphed, median_ms


def time_copy(benchmark, *sizes: int) -> list[float]:
    """Milliseconds of copies that move so many bytes, half of them read, half written.

    On a GPU, CUDA graphs over buffers that together are larger than its L2 cache.
    """

    def copy_of(size):
        source = torch.empty(size // 2, dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    rounds = [[copy_of(size) for _ in range(copies(size))] for size in sizes]
    times = median_ms(benchmark, *map(graphed, rounds))
    return [ms / len(fns) for ms, fns in zip(times, rounds, strict=True)]


def time_op(benchmark, op: Callable, reference: Callable, make: Callable) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward of op, once it agrees with the reference.

    On a GPU, CUDA graphs over several inputs that together are larger than its L2 cache. The
    backward is forward and backward less the forward.

    Args:
        op, reference: return a list of tensors.
        make: returns fresh random inputs, all of them with a gradient.
    """

    def forward_backward(fn, inputs, douts):
        outs = fn(*inputs)
        return [*outs, *torch.autograd.grad(outs, inputs, douts)]

    def make_set():
        inputs = make()
        return inputs, [torch.randn_like(out) for out in reference(*inputs)]

    first = make_set()
    bound = 1e-2 if DTYPE == torch.bfloat16 else 1e-5
    check_agreement(forward_backward(op, *first), forward_backward(reference, *first), bound)

    sets = [make_set() for _ in range(copies(sum(t.nbytes for t in first[0])))]
    forward = graphed([lambda inputs=inputs: op(*inputs) for inputs, _ in sets])
    both = graphed([lambda s=s: forward_backward(op, *s) for s in sets])
    forward_ms, both_ms = median_ms(benchmark, forward, both)
    return forward_ms / len(sets), (both_ms - forward_ms) / len(sets)


def table(op: str, shape: str) -> Table:
    """The table of an op whose rows have a `shape` of this form."""
    title = f"{op}; copy: the row of that name, which moves as many bytes, else the copy above"
    return Table(title, partial(line, shape))


def line(shape: str, row: dict, rows: list[dict], results: dict) -> dict:
    def rate(row, direction):
        ms = row.get(f"{direction}_ms")
        return ratio(row.get(f"{direction}_bytes"), ms and ms * 1e6)

    def both_ms(row):
        return row.get("forward_ms", 0) + row.get("backward_ms", 0)

    line = {
        f"shape {shape}": row.get("shape", "-"),
        "variant": row.get("variant", "-"),
        "provider": row["provider"],
    }
    for direction in ("forward", "backward"):
        ms = row.get(f"{direction}_ms")
        copy = rate(find(rows, row, "copy"), direction) or results["copy_gb_per_s"]
        line |= {
            f"{direction} (us)": number(ms and ms * 1e3),
            f"{direction} (GB/s)": number(rate(row, direction)),
            f"{direction} (% of copy)": number(ratio(rate(row, direction), copy / 100)),
        }
    fused = find(rows, row, "fused")
    return line | {"fwd + bwd over fused (x)": number(ratio(both_ms(row), both_ms(fused)))}
