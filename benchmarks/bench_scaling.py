"""The train step against the batch, and against the length at as many tokens a step.

Where all levels have a window, a token should cost the same at any length.
"""

import gc
from typing import NamedTuple

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import shapes
from benchmarks.bench_model import measure
from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import number, ratio
from benchmarks.charts import color_of, panels_of
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
SCALED = ("B", "C")  # measured at several batches and lengths
CASES = [Case(name, batch) for name in SCALED for batch in BATCHES]
CASES += [Case("C", TOKENS // n, n, DEPTH) for n in LENGTHS]


def line(row: dict, rows: list[dict], results: dict) -> dict:
    return {
        "config": row["config"],
        "batch x length": row.get("shape", "-"),
        "provider": row["provider"],
        "step (ms)": number(row.get("ms")),
        "time a token (us)": number(ratio(1e6, row.get("tokens_per_s"))),
        "peak memory (GiB)": number(row.get("peak_gib")),
    }


def chart(rows: list[dict]) -> Figure:
    """The train step over the batch, or over the length where that varies."""
    panels = panels_of(rows)
    figure = Figure((5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False).flat
    for axis, (config, rows) in zip(axes, panels.items(), strict=True):
        by_length = len({row["seq_len"] for row in rows}) > 1
        x = "seq_len" if by_length else "batch"
        for provider in sorted({row["provider"] for row in rows}):
            line = [
                (row[x], 1e6 / row["tokens_per_s"] if by_length else row["ms"])
                for row in sorted(rows, key=lambda row: row[x])
                if row["provider"] == provider
            ]
            style = dict(marker="o", color=color_of(provider), label=provider)
            axis.plot(*zip(*line, strict=True), **style)
        ticks = sorted({row[x] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set(
            title=f"configuration {config}",
            xlabel=f"length, {rows[0]['batch'] * rows[0]['seq_len']:,} tokens a step"
            if by_length
            else f"batch of {rows[0]['seq_len']:,} tokens",
            ylabel="time a token (us)" if by_length else "step (ms)",
            ylim=(0, None),
        )
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


BENCHMARK = Benchmark(
    ("fused", "reference"),
    (Table("Train step against the batch, and against the length at as many tokens", line),),
    place=3,
    has=lambda provider, config: config in SCALED,
    chart=chart,
)


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
