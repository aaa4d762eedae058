"""linear_cross_entropy, forward and backward: its products' FLOPs against those of cuBLAS alone."""

import pytest

from benchmarks.benchmark import Benchmark
from benchmarks.losses import Case, table, time_loss
from benchmarks.providers import ours
from benchmarks.timing import DEVICE
from shtx_kernels import reference

CASES = {
    "cuda": [
        *(Case(32768, 512, V) for V in (256, 20000)),
        *(Case(16384, 1024, V) for V in (256, 20000)),
        Case(32768, 512, 257),
    ],
    "cpu": [Case(64, 16, 50)],
}[DEVICE]


def liger(x, weight, targets):
    """Liger's, whose gradients, too, are made in forward; it synchronises."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    w = weight.to(x.dtype)
    return LigerFusedLinearCrossEntropyFunction.apply(x.flatten(0, 1), w, targets.flatten())[0]


def cut(x, weight, targets):
    """cut-cross-entropy, with no gradient left out."""
    from cut_cross_entropy import linear_cross_entropy

    w = weight.to(x.dtype)
    return linear_cross_entropy(x.flatten(0, 1), w, targets.flatten(), filter_eps=None)


PEERS = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
OPS = ours("linear_cross_entropy") | {"liger": liger, "cut-cross-entropy": cut, "cublas": None}
BENCHMARK = Benchmark((*OPS,), (table("linear_cross_entropy"),), peers=PEERS)


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_linear_cross_entropy(benchmark, case, provider):
    graph = provider not in PEERS
    time_loss(benchmark, case, OPS[provider], reference.linear_cross_entropy, graph)
