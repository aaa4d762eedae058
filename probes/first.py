"""A first token: wall time, what the host does (cProfile), and how long the GPU is busy.

python -m probes.first A B C D
"""
import cProfile
import io
import pstats
import sys
import time
from statistics import median

import torch

from benchmarks import shapes
from shtx import HierarchicalTransformer

for name in sys.argv[1:]:
    config = shapes.CONFIGS[name]
    torch.manual_seed(0)
    model = HierarchicalTransformer(**config.model).cuda().bfloat16()
    for batch in (1, 64):
        prompt = torch.randint(1, config.model["num_tokens"], (batch, 128), device="cuda")

        def first():
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(prompt, 1)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3

        for _ in range(4):
            first()
        print(f"{name} batch {batch}: first token {median(first() for _ in range(20)):.2f} ms", flush=True)
        with torch.profiler.profile() as profiler:
            first()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.time_range.elapsed_us() for e in kernels)
        span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
        print(f"  kernels {len(kernels)}, busy {busy / 1e3:.2f} ms of a span of {span / 1e3:.2f}")
        gaps = sorted(kernels, key=lambda e: e.time_range.start)
        gaps = [(b.time_range.start - a.time_range.end, a.name[:40], b.name[:40]) for a, b in zip(gaps, gaps[1:])]
        for gap in sorted(gaps, reverse=True)[:6]:
            print("  gap us", gap)
        if batch == 1:
            with cProfile.Profile() as calls:
                for _ in range(20):
                    first()
            text = io.StringIO()
            pstats.Stats(calls, stream=text).sort_stats("cumtime").print_stats(24)
            print("\n".join(line[:110] for line in text.getvalue().splitlines()[6:]))
    del model
    torch.cuda.empty_cache()
