"""The train step against the batch, and against the length at as many tokens a step.

Where all levels have a window, a token should cost the same at any length.
"""

import gc
from typing import NamedTuple

import pytest
import torch

from benchmarks import shapes
from benchmarks.bench_model import measure
from benchmarks.providers import build_reference, load
from benchmarks.timing import DEVICE


class Case(NamedTuple):
    config: str
    batch: int
    seq_len: int | None = None  # None: the configuration's
    depth: int | None = None

    def config_of(self) -> shapes.Config:
        changes = {"seq_len": self.seq_len, "depth": self.depth}
        changes = {name: value for name, value in changes.items() if value}
        return shapes.Config(self.batch, shapes.configs(DEVICE)[self.config].model | changes)

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        name = f"{self.config}, depth {self.depth}" if self.depth else self.config
        return {"config": name, "shape": f"{self.batch} x {self.config_of().model['seq_len']}"}


# levels with windows, so shallow that the reference has room for the tokens
TOKENS, LENGTHS, BATCHES, DEPTH = (
    (65536, (1024, 4096, 16384, 65536), (1, 4, 16), 4)
    if DEVICE == "cuda"
    else (512, (128, 512), (1, 2), 1)
)
CASES = [Case(name, batch) for name in shapes.SCALED for batch in BATCHES]
CASES += [Case("C", TOKENS // n, n, DEPTH) for n in LENGTHS]


def pytest_generate_tests(metafunc):
    names = metafunc.config.getoption("--config")
    cases = [case for case in CASES if case.config in names]
    metafunc.parametrize("case", cases, ids=lambda case: "-".join(case.labels().values()))


def bench_scaling(benchmark, case, provider):
    try:
        measure(benchmark, case.config_of(), provider, lambda: None, build_reference, load)
        reason = None
    except torch.OutOfMemoryError as error:
        reason = str(error)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    if reason:  # raised here, as the traceback would keep the memory that the next case needs
        pytest.fail(f"out of memory: {reason}", pytrace=False)
