"""compute-sanitizer over every kernel: `python -m tests.campaign.sanitizers` is what it watches."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import torch
from helpers import ROOT

from tests.campaign import Part

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PATIENCE = 3600  # seconds
PLACES = os.pathsep.join((os.environ["PATH"], "/usr/local/cuda/bin"))


def every_op() -> None:
    """All ops on small shapes, forward and backward, in fp32 and bf16; those of a token, too."""
    from generation import OPTIONS, build, draw
    from test_autograd import calls

    import shtx_kernels

    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        for name, call, x in calls():
            call(shtx_kernels).sum().backward()
            print(dtype, name, x.grad.isfinite().all().item())
        model = build(OPTIONS, impl="fused")
        ids = draw(tokens=17)
        model(ids, return_loss=True)[0].backward()
        for options in (dict(temperature=0), dict(top_k=5, top_p=0.5, seed=0)):
            model.generate(ids[:, :5], 20, **options)
        print(dtype, "a step, tokens")
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sanitizers(count: int, random: Random, folder: Path) -> Part:
    """Each tool over `every_op`. PyTorch's cache of memory, which hides what is out of bounds, is
    off."""
    part = Part("sanitizers")
    sanitizer = shutil.which("compute-sanitizer", path=PLACES)
    if not torch.cuda.is_available() or sanitizer is None:
        part.notes = "not run: needs a CUDA device and compute-sanitizer"
        return part
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    for tool in TOOLS[:count]:
        command = [sanitizer, "--tool", tool, "--target-processes", "all"]
        done = subprocess.run(
            [*command, sys.executable, "-m", "tests.campaign.sanitizers"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE,
        )
        part.tried += 1
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout)
        if done.returncode or [*map(int, summary)] != [0]:
            part.findings.append(f"{tool}: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return part


if __name__ == "__main__":
    every_op()
