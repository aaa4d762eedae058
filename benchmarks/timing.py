"""Times functions, on a GPU and on a CPU."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def mark():
    """A point in time on the device: an event on the current stream, or the clock."""
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start, end) -> float:
    return (end - start) * 1e3 if DEVICE == "cpu" else start.elapsed_time(end)


def median_ms(
    benchmark, *fns: Callable, calls: int = 5, rounds: int = 4, warmup_rounds: int = 1
) -> list[float]:
    """Median time of each function in ms, over `calls` x `rounds` runs of all of them in turn.

    The calls of a round queue up behind each other, as the steps of a training loop do; the
    `warmup_rounds` before them do not count.
    """
    times = [[] for _ in fns]

    def burst():
        for kept in times:
            kept.append([])
        marks = [mark()]
        for _ in range(calls):
            for fn in fns:
                fn()
                marks.append(mark())
        synchronize()
        for i, interval in enumerate(pairwise(marks)):
            times[i % len(fns)][-1].append(elapsed_ms(*interval))

    benchmark.pedantic(burst, rounds=rounds, warmup_rounds=warmup_rounds)
    return [median(ms for burst in kept[warmup_rounds:] for ms in burst) for kept in times]


def host_ms(fn: Callable, calls: int = 5) -> float:
    """Median time in ms until fn returns, of a device that has nothing else to do: what the host
    takes to tell it all. A step cannot take less.
    """
    times = []
    for _ in range(calls):
        synchronize()
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def kernel_ms(fn: Callable, calls: int = 3) -> dict[str, float]:
    """Milliseconds that each kernel of the GPU takes in a call of fn, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            fn()
        synchronize()
    on_gpu = lambda event: event.device_type == torch.autograd.DeviceType.CUDA
    events = filter(on_gpu, profile.key_averages())
    return {event.key: event.self_device_time_total / calls / 1e3 for event in events}


def graphed(fns: list[Callable]) -> Callable:
    """One callable that runs all of fns, each with outputs of its own: on a GPU a CUDA graph."""

    def run():
        return [fn() for fn in fns]

    if DEVICE == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check_agreement(ours: list[Tensor], reference: list[Tensor], bound: float):
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).norm() / b.norm())
        if not error <= bound:
            raise ValueError(
                f"output or gradient {i} is {error:.1e} off the reference, bound {bound:.0e}"
            )


def copies(nbytes: int) -> int:
    """Count the sets of `nbytes` bytes that exceed a GPU's L2 cache; at least two."""
    if DEVICE == "cpu":
        return 2
    return 2 + min(64, 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size // nbytes)
