"""The machine, and the most it does: the bandwidth of a copy, the rate of a matrix product."""

import platform
import shutil
import subprocess

import torch

from benchmarks.timing import DEVICE, DTYPE, median_ms


def machine() -> dict:
    """GPU and versions; None for what is not there."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        driver = lines[0] if lines else None
    gpu = torch.cuda.get_device_properties(0) if DEVICE == "cuda" else None
    return {
        "gpu": gpu and gpu.name,
        "gpu_memory_gib": gpu and round(gpu.total_memory / 2**30),
        "driver": driver,
        "cpu": platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "python": platform.python_version(),
    }


def bench_ceilings(benchmark):
    size, n = (2**32, 8192) if DEVICE == "cuda" else (2**26, 512)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, dtype=DTYPE, device=DEVICE) for _ in range(2))
    copy_ms, matmul_ms = median_ms(benchmark, lambda: target.copy_(source), lambda: a @ b)
    benchmark.extra_info |= {
        "machine": machine(),
        "copy_gb_per_s": 2 * size / copy_ms / 1e6,  # read and written
        "matmul_tflop_per_s": 2 * n**3 / matmul_ms / 1e9,
    }
