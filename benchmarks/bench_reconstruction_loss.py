"""reconstruction_loss, forward and backward: its products' FLOPs against those of cuBLAS alone."""

from functools import partial

import pytest
import torch

import shtx_kernels
from benchmarks.losses import Case, time_loss
from benchmarks.timing import DEVICE
from shtx_kernels import reference

CASES = {
    "cuda": [
        *(Case(T, 512, 20000, C) for T, C in ((32768, 2), (8192, 8))),
        Case(32768, 512, 256, 2),
        Case(8192, 512, 256, 8),
    ],
    "cpu": [Case(64, 16, 50, 2)],
}[DEVICE]

OPS = {
    "fused": getattr(shtx_kernels, "reconstruction_loss", None),
    "reference": reference.reconstruction_loss,
    "reference-compiled": torch.compile(reference.reconstruction_loss),
    "cublas": None,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_reconstruction_loss(benchmark, case, provider):
    taps = dict(compress=case.C, stride=1)
    op = OPS[provider] and partial(OPS[provider], **taps)
    time_loss(benchmark, case, op, partial(reference.reconstruction_loss, **taps))
