"""compute-sanitizer over every kernel; `python -m tests.campaign.sanitizers float32 memcheck` is
what it watches."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from helpers import DEVICE, ROOT

from tests.campaign import Case

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DTYPES = ("float32", "bfloat16")
PATIENCE = 3600  # seconds
PLACES = os.pathsep.join((os.environ["PATH"], "/usr/local/cuda/bin"))


def multiply_in_fp32(device: str) -> torch.library.Library:
    """Let PyTorch multiply matrices by way of fp32, as long as what is returned is there.

    initcheck reports reads of products of bf16 as of memory that nothing has written, though cuBLAS
    has: it seems not to see what the tensor memory accelerator writes.
    """

    def products(a, b):  # none that goes on to one of those below
        return torch.baddbmm(a.new_zeros((), dtype=torch.float32), a.float(), b.float(), beta=0)

    def product(a, b):
        return products(a[None], b[None])[0]

    def with_bias(bias, a, b, beta=1, alpha=1):
        return beta * bias + alpha * product(a, b)

    library = torch.library.Library("aten", "IMPL")
    implementations = {
        "mm": lambda a, b: product(a, b).to(a.dtype),
        "mm.out": lambda a, b, *, out: out.copy_(product(a, b)),
        "mm.dtype_out": lambda a, b, dtype, *, out: out.copy_(product(a, b)),
        "bmm": lambda a, b: products(a, b).to(a.dtype),
        "bmm.out": lambda a, b, *, out: out.copy_(products(a, b)),
        "bmm.dtype_out": lambda a, b, dtype, *, out: out.copy_(products(a, b)),
        "addmm": lambda *terms, **factors: with_bias(*terms, **factors).to(terms[1].dtype),
        "addmm.out": lambda *terms, out, **factors: out.copy_(with_bias(*terms, **factors)),
        "addmm.dtype_out": lambda bias, a, b, dtype, *, out, **factors: out.copy_(
            with_bias(bias, a, b, **factors)
        ),
    }
    for name, implementation in implementations.items():
        library.impl(name, implementation, device.upper())
    return library


def every_op(dtype: torch.dtype) -> None:
    """All ops on small shapes, forward and backward; those of a token, too."""
    from generation import OPTIONS, build, draw
    from test_autograd import calls

    import shtx_kernels

    torch.set_default_dtype(dtype)
    for name, call, x in calls():
        call(shtx_kernels).sum().backward()
        print(name, x.grad.isfinite().all().item())
    model = build(OPTIONS, impl="fused")
    ids = draw(tokens=17)
    model(ids, return_loss=True)[0].backward()
    # without CUDA graphs: a capture needs PyTorch's cache of memory
    with patch("shtx.generation.session.Graphs", lambda device: None):
        for options in (dict(temperature=0), dict(top_k=5, top_p=0.5, seed=0)):
            model.generate(ids[:, :5], 20, **options)
    print("a step, tokens")
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sanitizers(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Each tool over `every_op`. PyTorch's cache of memory, which hides what is out of bounds, is
    off."""
    sanitizer = shutil.which("compute-sanitizer", path=PLACES)
    if not torch.cuda.is_available() or sanitizer is None:
        raise RuntimeError("sanitizers need a CUDA device, and compute-sanitizer on the PATH")
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    cases = [*product(TOOLS, DTYPES)]
    for tool, dtype in cases[numbers.start : numbers.stop : numbers.step]:
        command = [sanitizer, "--tool", tool, "--target-processes", "application-only"]
        done = subprocess.run(
            [*command, sys.executable, "-m", "tests.campaign.sanitizers", dtype, tool],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE,
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout)
        clean = done.returncode == 0 and [*map(int, summary)] == [0]
        yield Case(None if clean else f"{tool}, {dtype}: {told(done.stdout, done.stderr)}")


def told(stdout: str, stderr: str) -> str:
    """Return what a tool has said at last, and how what it watched ended; no paths of a machine."""
    lines = [line for line in stdout.splitlines() if line.startswith("=========")]
    return "\n".join([*lines[-20:], *stderr.strip().splitlines()[-1:]])


if __name__ == "__main__":
    kept = multiply_in_fp32(DEVICE) if sys.argv[2:] == ["initcheck"] else None
    every_op(getattr(torch, sys.argv[1]))
