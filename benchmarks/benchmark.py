"""A benchmark's description of itself, and the list of those that `python -m benchmarks` measures.

A file `bench_<name>.py` here that has a BENCHMARK is one of them; nothing else names it.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import DEVICE
from shtx.ops import why_not_fused

UPSTREAM = "simple-hierarchical-transformer"


class Table(NamedTuple):
    """A table of results.

    line: makes the cells of a row, by heads that end with a unit in brackets where they are
        numbers, from it, all rows of the benchmark and all results; None for a row without any.
    """

    title: str
    line: Callable[[dict, list[dict], dict], dict | None]


class Benchmark(NamedTuple):
    """The providers that are measured, and how results are shown. An op has no place."""

    providers: tuple[str, ...]
    tables: tuple[Table, ...]
    place: int | None = None  # among those of the whole model, which come before ops
    fused: tuple[str, ...] = ()  # providers that run fused ops, besides those called fused
    peers: dict[str, str | None] = {}  # providers that need a GPU, and the package that has them
    upstream: str = "0.2.0"  # version of the provider upstream
    has: Callable[[str, str], bool] = lambda provider, config: True
    first_steps: bool = False  # whether it takes the fixture wait_for_turn once it has compiled
    chart: Callable[[list[dict]], object] | None = None  # makes a figure of rows without errors

    def is_fused(self, provider: str) -> bool:
        return provider.startswith("fused") or provider in self.fused

    def why_not(self, provider: str) -> str | None:
        """Return the reason why a provider cannot be measured here; None if it can."""
        if self.is_fused(provider):
            return why_not_fused(torch.device(DEVICE))
        if provider in self.peers and DEVICE == "cpu":
            return "needs a CUDA device"
        if (package := self.peers.get(provider)) and not find_spec(package):
            return f"{package.replace('_', '-')} is not installed"
        if provider.startswith("upstream"):
            try:
                found = version(UPSTREAM)
            except PackageNotFoundError:
                return f"{UPSTREAM}=={self.upstream} is not installed"
            if found != self.upstream:
                return f"{UPSTREAM} is {found}, the peer is {self.upstream}"
        return None

    def by_default(self) -> list[str]:
        """A CPU leaves out what takes minutes there (compiling) or means nothing (interpreting)."""
        unfit = lambda p: self.is_fused(p) or p in self.peers or p.endswith("-compiled")
        return [p for p in self.providers if DEVICE == "cuda" or not unfit(p)]

    def compiles(self, provider: str) -> bool:
        """Return whether first steps take so long that processes should take theirs together."""
        return self.first_steps and (self.is_fused(provider) or provider.endswith("-compiled"))


@cache
def benchmarks() -> dict[str, Benchmark]:
    """All that there are, by name, those of the whole model first."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    pages = {name: import_module(f"benchmarks.{name}") for name in names}
    found = {
        name.removeprefix("bench_"): page.BENCHMARK
        for name, page in pages.items()
        if hasattr(page, "BENCHMARK")
    }
    return dict(sorted(found.items(), key=lambda item: item[1].place or inf))


def ops() -> list[str]:
    """Names of the benchmarks of single ops."""
    return [name for name, benchmark in benchmarks().items() if benchmark.place is None]
