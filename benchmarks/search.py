"""Times tile sizes of the fused ops' kernels on this GPU, those of attention checked against fp64.

    python -m benchmarks.search [PAGE ...] --out DIR

Prints the fastest of each case and writes all of them to DIR/search.json. Attention's tiles are
compiled side by side and timed here; other pages of shtx_kernels have their constants in
`spaces.py`, and are timed by the benchmarks of the ops that they belong to.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import report
from benchmarks.__main__ import STAMP_HELP, check, make_folder
from benchmarks.bench_ceilings import machine
from benchmarks.cells import key
from benchmarks.commit import resolve
from benchmarks.runner import Job, run
from benchmarks.spaces import SPACES, grid
from benchmarks.timing import graphed
from shtx_kernels import launch, reference
from shtx_kernels.rotary_attention import library, rotations, tiles

TILES = "rotary_attention.tiles"
PAGES = [TILES, *SPACES]  # attention first: its processes must fork before CUDA starts
TIMEOUT = 500  # seconds for a choice
STAY = ExitStack()  # what a process that compiles holds to its end
FORWARDS = FORWARD, FORWARD_BY_TILES = "forward", "forward_by_tiles"
BY_TILES = "backward_by_tiles"
BY_KEYS, BY_QUERIES = "backward_by_keys", "backward_by_queries"


class Case(NamedTuple):
    E: int
    window: int  # -1: all
    B: int
    M: int
    H: int

    @property
    def options(self) -> tuple:
        xpos, interleaved = self.window < 0, False
        return (self.H, self.window, 1, xpos, interleaved, self.E**-0.5)


CASES = [
    *(Case(64, window, 16, 2048, 8) for window in (16, 32, 64, 128)),
    Case(32, 32, 16, 2048, 16),
    Case(16, 16, 16, 2048, 32),
    Case(128, 64, 16, 2048, 4),
    Case(128, 256, 2, 8192, 16),
    Case(64, -1, 128, 256, 8),
]


def candidates(kernel: str, case: Case) -> list[dict]:
    if kernel in (FORWARD_BY_TILES, BY_TILES):
        widest = max(16, triton.next_power_of_2(case.window))
        sizes = grid(
            BLOCK=(16, 32, 64),
            HALO=(widest,) if kernel == FORWARD_BY_TILES else (16, 32, 64),
            num_warps=(1, 2, 4),
            num_stages=(1,),
            maxnreg=(None, 128, 168),
        )
        one_warp_has = lambda c: c["BLOCK"] // c["num_warps"]
        limited = lambda c: c["maxnreg"] and c["num_warps"] < 4  # small tiles take few registers
        sizes = [c for c in sizes if 16 <= one_warp_has(c) <= 32 and not limited(c)]
        return [c for c in sizes if c["HALO"] <= widest]
    if kernel == FORWARD:
        stages = (2, 3) if case.window < 0 else (1, 2) if case.window > tiles.SHORT else (1,)
        sizes = grid(
            BLOCK_M=(64, 128),
            BLOCK_N=(32, 64, 128),
            num_warps=(4, 8),
            num_stages=stages,
            maxnreg=(None, 128),
        )
    else:
        return grid(BLOCK_M=(32, 64), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2))
    return [c for c in sizes if 16 * c["num_warps"] <= c["BLOCK_M"]]


def jobs() -> list[tuple[str, Case, dict]]:
    found = []
    for case in CASES:
        local = case.window > 0 and case.E <= 64
        forward = FORWARD_BY_TILES if local and case.window <= 64 else FORWARD
        backward = (BY_TILES,) if local and case.window <= 128 else (BY_KEYS, BY_QUERIES)
        for kernel in (forward, *backward):
            found += [(kernel, case, sizes) for sizes in candidates(kernel, case)]
    return found


def compile_only(job: tuple[str, Case, dict]) -> str | None:
    """Compile into Triton's cache, in a process that needs no GPU. Return the error, if any."""
    kernel, case, sizes = job
    shipped = getattr(tiles, kernel)
    setattr(tiles, kernel, lambda *_: sizes)
    qkv = torch.empty(case.B, case.M, 3 * case.H * case.E, dtype=torch.bfloat16)
    try:
        table = rotations.make_table(qkv, case.E, case.M)
        out, lse, _ = torch.ops.shtx.rotary_attention(qkv, table, *case.options)
        if kernel not in FORWARDS:
            torch.ops.shtx.rotary_attention_bwd(qkv, table, out, lse, out, *case.options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        setattr(tiles, kernel, shipped)


def without_a_gpu(capability: int):
    class NoDevice:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(NoDevice())
    STAY.enter_context(launch.compile_only())


def time_ms(calls: list[Callable]) -> float:
    replay, times = graphed(calls), []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return median(times[1:])


def inputs(case: Case) -> tuple[list, list]:
    """Pairs of qkv and dout, more than the L2 cache holds; out and dqkv in fp64 of the first."""
    size = case.B, case.M, case.H * case.E
    random = lambda *size: torch.randn(size, device="cuda", dtype=torch.bfloat16)
    sets = [(random(*size[:2], 3 * size[2]), random(*size)) for _ in range(4)]
    qkv, dout = (t[:1].double() for t in sets[0])
    window = case.window if case.window > 0 else None
    out = reference.rotary_attention(
        qkv.requires_grad_(), case.H, window=window, xpos=case.window < 0
    )
    return sets, [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def measure(kernel: str, case: Case, sizes: dict, sets: list, truth: list) -> dict:
    """Time of forward, or of the whole backward, and its relative error."""
    setattr(tiles, kernel, lambda *_: sizes)
    row = dict(kernel=kernel, **case._asdict(), **sizes)
    table = rotations.make_table(sets[0][0], case.E, case.M)
    forward = lambda qkv: torch.ops.shtx.rotary_attention(qkv, table, *case.options)
    backward = lambda qkv, *saved: torch.ops.shtx.rotary_attention_bwd(
        qkv, table, *saved, *case.options
    )
    try:
        if kernel in FORWARDS:
            calls = [lambda s=s: forward(s[0])[0] for s in sets]
        else:
            saved = [(qkv, *forward(qkv)[:2], dout) for qkv, dout in sets]
            calls = [lambda s=s: backward(*s) for s in saved]
        got, true = calls[0]()[:1].double(), truth[kernel not in FORWARDS]
        return row | dict(ms=time_ms(calls), error=float((got - true).norm() / true.norm()))
    except Exception as problem:
        return row | dict(ms=None, problem=str(problem)[:100])


def time_of(row: dict) -> float:
    """Milliseconds, or microseconds a token; infinite where there was an error."""
    times = [row[name] for name in ("ms", "us_per_token") if name in row]
    both = [row[f"{way}_ms"] for way in ("forward", "backward") if f"{way}_ms" in row]
    return times[0] if times else sum(both) or math.inf


def try_choice(bench: str, page: str, choice: dict, configs: tuple, cache: Path) -> list[dict]:
    """Rows of a benchmark, which asserts agreement with the reference, in a process of its own."""
    constants = json.dumps({"page": page, "values": choice})
    with TemporaryDirectory() as folder:
        job = Job(bench, configs, "fused", constants=constants)
        found = [row for _, rows in run([job], Path(folder), cache, TIMEOUT) for row in rows]
    return [row | {"page": page, "constants": choice} for row in found]


def search_page(page: str, cache: Path, keep: Callable[[list[dict]], None]):
    """Time the constants that ship, then every choice; print the fastest of each case."""
    space = SPACES[page]
    for bench in space.benches:
        rows = []
        for choice in [{}, *space.choices]:
            tried = try_choice(bench, page, choice, space.configs, cache)
            keep(tried)
            rows += tried
        for case in dict.fromkeys(map(key, rows)):
            same = [row for row in rows if key(row) == case]
            print(page, *filter(None, case), flush=True)
            for row in [same[0], *sorted(same, key=time_of)[:3]]:
                print(f"  {time_of(row):9.4f}  {row['constants'] or 'as shipped'}", flush=True)


def search_attention(keep: Callable[[list[dict]], None]):
    """Sizes compile side by side, and are timed one by one."""
    library.takes = lambda *_: False  # what is searched is our own
    todo = jobs()
    major, minor = torch.cuda.get_device_capability()
    capability = (10 * major + minor,)
    with get_context("fork").Pool(os.cpu_count() - 1, without_a_gpu, capability) as pool:
        problems = pool.map(compile_only, todo, chunksize=1)
    print(f"{len(todo)} sizes, {sum(map(bool, problems))} do not compile", flush=True)

    shipped = dict(vars(tiles))
    for case in CASES:
        sets, truth = inputs(case)
        for kernel in dict.fromkeys(job[0] for job in todo if job[1] == case):
            tried = [
                measure(kernel, case, sizes, sets, truth)
                for name, other, sizes in todo
                if (name, other) == (kernel, case)
            ]
            setattr(tiles, kernel, shipped[kernel])
            tried = sorted(tried, key=lambda row: row["ms"] or math.inf)
            print(kernel, case, flush=True)
            for row in tried[:3]:
                names = "BLOCK", "HALO", "num", "max"
                sizes = {k: v for k, v in row.items() if k.startswith(names)}
                print(
                    f"  {row['ms'] or math.inf:7.4f} ms  error {row.get('error', 0):.1e}  {sizes}"
                )
            keep(tried)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("pages", nargs="*", metavar="PAGE", help=f"of {' '.join(PAGES)}; default: all")
    add("--out", type=Path, default=Path("runs/search"), metavar="DIR")
    add("--commit", metavar="STAMP", help=STAMP_HELP)
    options = parser.parse_args(argv)
    pages = check("PAGE", options.pages or PAGES, PAGES)
    make_folder("--out", options.out)
    results = {"commit": resolve(options.commit), "rows": []}

    def keep(rows: list[dict]):
        results["machine"] = machine()
        results["rows"] += rows
        report.write(options.out / "search.json", json.dumps(results, indent=1) + "\n")

    with TemporaryDirectory() as cache:
        for page in sorted(pages, key=PAGES.index):
            if page == TILES:
                search_attention(keep)
            else:
                search_page(page, Path(cache), keep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
