"""A train step on 1, 2, 4, ... GPUs, as many as there are; on a CPU, processes in their place.

Weak scaling: every GPU has the batch of the configuration. Strong: all of them share four times it.

Of a configuration that is SHARDED, several GPUs have parts, under FSDP2, and more layers than one
has room for; its steps run blocks again in the backward, on one GPU, too.
"""

import gc
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from functools import cache
from itertools import pairwise
from multiprocessing import connection
from statistics import median
from threading import Thread
from typing import NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks import shapes
from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import find, number, ratio
from benchmarks.providers import build_reference, load
from benchmarks.timing import DEVICE, DTYPE, autocast, elapsed_ms, mark, synchronize
from shtx import TrainStep
from shtx.fsdp import fully_shard_model

SHARED = 4  # batches of the configuration, in strong scaling
STEPS, WARMUP = (30, 10) if DEVICE == "cuda" else (3, 1)  # at most
LEAST = 8 if DEVICE == "cuda" else 1  # steps that count, however long they take
BUDGET = 10.0  # seconds of all steps together
MOST = torch.cuda.device_count() if DEVICE == "cuda" else 2


class Case(NamedTuple):
    config: str
    scaling: str
    gpus: int

    def config_of(self) -> shapes.Config:
        """Return the configuration with the batch of all GPUs."""
        config = shapes.configs(DEVICE)[self.config]
        times = self.gpus if self.scaling == "weak" else SHARED
        more = {"depth": shapes.SHARDED[self.config]} if self.sharded else {}
        return shapes.Config(config.batch * times, config.model | more)

    @property
    def sharded(self) -> bool:
        return self.gpus > 1 and self.config in shapes.SHARDED

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        return {"config": self.config, "shape": self.scaling, "variant": f"GPUs: {self.gpus}"}


GPUS = [2**i for i in range(MOST.bit_length())]
CASES = [
    case
    for name in shapes.CONFIGS
    for scaling in (("weak",) if name in shapes.SHARDED else ("weak", "strong"))
    for gpus in GPUS
    if (case := Case(name, scaling, gpus)).config_of().batch % gpus == 0
]


def share_of_one(row: dict, rows: list[dict]) -> float | None:
    """Throughput over that of as many GPUs as if each were alone; in FLOPs where one GPU has fewer
    layers.
    """
    one = find(rows, row | {"variant": "GPUs: 1"}, row["provider"])
    alone, together = (
        each.get("tokens_per_s") and each["tokens_per_s"] * each.get("flop_per_token", 1)
        for each in (one, row)
    )
    return ratio(together, alone and alone * row.get("gpus", 1))


def line(row: dict, rows: list[dict], results: dict) -> dict:
    share = share_of_one(row, rows)
    return {
        "config": row["config"],
        "scaling": row.get("shape", "-"),
        "GPUs": str(row.get("gpus", "-")),
        "provider": row["provider"],
        "batch x length": f"{row.get('batch', '-')} x {row.get('seq_len', '-')}",
        "step (ms)": number(row.get("ms")),
        "throughput (tokens/s)": number(row.get("tokens_per_s")),
        "of as many alone (%)": number(share and 100 * share),
        "peak memory of one (GiB)": number(row.get("peak_gib")),
    }


def chart(rows: list[dict]) -> Figure:
    """Throughput on several GPUs over that on one, a panel for each kind of scaling."""
    ticks = sorted({row["gpus"] for row in rows})
    kinds = sorted({row["shape"] for row in rows}, reverse=True)
    figure = Figure((5 * len(kinds), 4.2), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False).flat, kinds, strict=True):
        lines = {}
        for row in sorted(rows, key=lambda row: row["gpus"]):
            if row["shape"] == kind and (share := share_of_one(row, rows)):
                lines.setdefault(row["config"], []).append((row["gpus"], row["gpus"] * share))
        for label, line in sorted(lines.items()):
            axis.plot(*zip(*line, strict=True), marker="o", label=label)
        axis.plot(ticks, ticks, color="tab:gray", linestyle="--", label="as if each were alone")
        axis.set_xticks(ticks)
        axis.set(title=kind, xlabel="GPUs", ylabel="throughput over that of one GPU (x)")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left")
    return figure


ALONE, TOGETHER = shapes.CONFIGS["E"].model["depth"], shapes.SHARDED["E"]
TITLE = (
    "Train step on several GPUs; weak: a batch each, strong: four batches for all;"
    f" of E {ALONE} layers on one GPU, {TOGETHER} on several"
)
BENCHMARK = Benchmark(("fused",), (Table(TITLE, line),), place=4, chart=chart)


def pytest_generate_tests(metafunc):
    names = metafunc.config.getoption("--config")
    cases = [case for case in CASES if case.config in names]
    metafunc.parametrize("case", cases, ids=lambda case: "-".join(case.labels().values()))


def bench_gpus(benchmark, case, provider):
    config = case.config_of()
    with tempfile.TemporaryDirectory() as folder:
        given = case, config, provider, f"file://{folder}/rendezvous"
        futures = [worker(rank).submit(work, rank, *given) for rank in range(case.gpus)]
        wait(futures, return_when=FIRST_EXCEPTION)
        try:
            row, *_ = [future.result(timeout=60) for future in futures]
        except BaseException:
            end_workers()  # those that still wait for the one that failed, too
            raise
    tokens = config.batch * config.model["seq_len"]
    row |= {"gpus": case.gpus, "batch": config.batch, "seq_len": config.model["seq_len"]}
    flop_per_token = 3 * shapes.flops(shapes.products(config)) / tokens
    row |= {"tokens_per_s": tokens / row["ms"] * 1e3, "flop_per_token": flop_per_token}
    benchmark.extra_info |= row


@cache
def worker(rank: int) -> ProcessPoolExecutor:
    """Return the process that measures on a GPU. It lives on from case to case, as it takes longer
    to import PyTorch and to load kernels than to measure.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=end_with_parent)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has gone. An executor's process does not,
    if that one is killed: it would keep its GPU for good.
    """
    parent = multiprocessing.parent_process().sentinel
    Thread(target=lambda: (connection.wait([parent]), os._exit(1)), daemon=True).start()


def end_workers() -> None:
    for process in multiprocessing.active_children():
        process.kill()
    worker.cache_clear()


class Phases:
    """The seconds that parts of a case take; the first process says each as it ends."""

    def __init__(self, case: Case):
        self.case, self.seconds = case, {}
        self.start = time.perf_counter()

    def end(self, phase: str) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.start = now - self.start, now
        if dist.get_rank() == 0:
            labels = " ".join(self.case.labels().values())
            print(f"{labels}: {phase} {self.seconds[phase]:.1f} s", flush=True)


def work(rank: int, case: Case, config: shapes.Config, provider: str, rendezvous: str) -> dict:
    """Measure in one process."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, rendezvous, world_size=case.gpus, rank=rank)
    row = measure(rank, case, config, provider)
    gc.collect()  # a sharded model has groups of processes, which must not end after all others
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    dist.barrier()  # none leaves while the other is at work
    dist.destroy_process_group()
    return row


def measure(rank: int, case: Case, config: shapes.Config, provider: str) -> dict:
    phases = Phases(case)
    # drawn on the device: a model on meta gets the numbers of the CPU's generator, which takes more
    # than a minute for six billion
    model = build_reference(config)
    if case.sharded:
        model = fully_shard_model(model, param_dtype=DTYPE)
    model.checkpointing = case.config in shapes.SHARDED
    phases.end("build")
    torch.manual_seed(1 + rank)
    size = (config.batch // case.gpus, config.model["seq_len"] + 1)
    ids = torch.randint(1, config.model["num_tokens"], size, device=DEVICE)  # all labels count
    with torch.no_grad(), autocast():  # a few at a time, for memory
        parts = [len(part) * model(part, return_loss=True)[0] for part in ids.split(4)]
    expected = sum(parts) / config.batch
    dist.all_reduce(expected)
    phases.end("reference")

    if DEVICE == "cuda":  # the peak is that of the steps alone
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = load(provider, model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    precision = "bf16-mixed" if DEVICE == "cuda" else "fp32"
    step = TrainStep(model, optimizer, precision=precision, cuda_graph=not case.sharded)
    loss = float(step(ids)[0])
    if not abs(loss - expected) <= 2e-2 * abs(expected):
        raise ValueError(f"loss {loss:.4f} disagrees with the reference's {float(expected):.4f}")
    phases.end("first step")
    step(ids)  # which captures
    phases.end("second step")
    step(ids)
    phases.end("third step")
    steps, warmup = how_many(of_all(phases.seconds["third step"]))
    for _ in range(warmup):
        step(ids)
    synchronize()
    marks = [mark()]
    for _ in range(steps):
        step(ids)
        marks.append(mark())
    phases.end("steps")
    ms = of_all(median(elapsed_ms(*pair) for pair in pairwise(marks)))
    if not case.sharded:
        check_equal(model)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    step.close()
    row = {"ms": ms, "peak_gib": peak, "loss": loss, "reference_loss": float(expected)}
    return row | {"steps": steps, "seconds": phases.seconds}


def of_all(value: float) -> float:
    """Return the greatest value of all processes, which is the same in all of them."""
    greatest = torch.tensor(value, device=DEVICE)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return float(greatest)


def how_many(step_s: float) -> tuple[int, int]:
    """Return how many steps count and how many warm up, of those that the budget has time for."""
    share = min(1.0, BUDGET / (step_s * (STEPS + WARMUP)))
    return max(LEAST, int(share * STEPS)), max(1, int(share * WARMUP))


def check_equal(model: torch.nn.Module):
    for name, p in model.named_parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, p):
            raise ValueError(f"rank {dist.get_rank()} has other weights than rank 0: {name}")
