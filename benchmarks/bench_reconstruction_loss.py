"""reconstruction_loss, forward and backward: its products' FLOPs against those of cuBLAS alone."""

from functools import partial

import pytest

from benchmarks.benchmark import Benchmark
from benchmarks.losses import Case, table, time_loss
from benchmarks.providers import ours
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

OPS = ours("reconstruction_loss") | {"cublas": None}
BENCHMARK = Benchmark((*OPS,), (table("reconstruction_loss"),))


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_reconstruction_loss(benchmark, case, provider):
    taps = dict(compress=case.C, stride=1)
    op = OPS[provider] and partial(OPS[provider], **taps)
    time_loss(benchmark, case, op, partial(reference.reconstruction_loss, **taps))
