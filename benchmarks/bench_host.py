"""Time on the host of forward and backward of a plain model, and the share of it that goes into
looking for modules that tools have changed (`shtx.plan.look`): it must be at most 1%.

Forward and backward of one short sequence, so that a GPU never keeps the host waiting; without a
GPU, what the reference computes is in it, too. Run it by itself:

    pytest -c benchmarks/pytest.ini benchmarks/bench_host.py --config A
"""

import time
from statistics import median
from unittest.mock import patch

import torch

from benchmarks import shapes
from benchmarks.timing import DEVICE, autocast, synchronize
from shtx import HierarchicalTransformer
from shtx.plan import look

CALLS, ROUNDS = 3, 10


def bench_host(benchmark, config):
    options = shapes.configs(DEVICE)[config].model
    with torch.device(DEVICE):
        model = HierarchicalTransformer(**options)
        ids = torch.randint(1, options["num_tokens"], (1, 129))
    found = look(model)

    def forward_backward():
        with autocast():
            loss, _ = model(ids, return_loss=True)
        loss.backward()

    def without_looking():
        with patch("shtx.plan.look", lambda model: found):
            forward_backward()

    fns = {"ms": forward_backward, "without_looking_ms": without_looking}
    fns["looking_ms"] = lambda: look(model)
    times = {name: [] for name in fns}

    def burst():
        for name, fn in fns.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                fn()
            times[name].append((time.perf_counter() - start) / CALLS * 1e3)
            model.zero_grad()

    benchmark.pedantic(burst, rounds=ROUNDS, warmup_rounds=2)
    row = {name: median(kept[2:]) for name, kept in times.items()}
    row["looking_percent"] = 100 * row["looking_ms"] / row["without_looking_ms"]
    benchmark.extra_info |= row
    print({name: round(value, 3) for name, value in row.items()})
