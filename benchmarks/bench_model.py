"""A train step on random ids: zero_grad, forward under bf16 autocast, backward, fused AdamW.

`fused` is shtx.TrainStep, which replays a CUDA graph. `fused-graphs` is the loop that users write,
under model.graphs; `fused-eager` the same without, `fused-compiled` and the like of what
torch.compile makes of the model. What it makes of peers is timed with a CUDA graph of the step
where that is faster, or without.
`repaired-compiled` is the peer to beat: the reference with the best attention PyTorch has.

Its floor: every matrix product of forward, input gradient and weight gradient through cuBLAS in
one CUDA graph, and AdamW on as many parameters. Its bound, `shapes.bound`, adds to the products at
the floor's rate what else has to pass memory, at the rate of a copy.
"""

import math
import re
import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from benchmarks import shapes
from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import find, number, ratio
from benchmarks.charts import bars
from benchmarks.providers import build_reference, load
from benchmarks.timing import (
    DEVICE,
    DTYPE,
    autocast,
    graphed,
    host_ms,
    kernel_ms,
    median_ms,
    synchronize,
)
from shtx import TrainStep

PARTS = {  # parts of a fused step, by names of kernels; the first that fits counts
    "attention": "rotary_attention|sdpa|flash",
    "norm, shift": "norm_token_shift",
    "products with GELU": "gelu",
    "merge": "hierarchical_merge",
    "compress": "causal_compress|one_hot|chunk_summary",
    "losses": "cross_entropy|hierarchical_ar_loss|_scale_kernel|next_latent",
    "bias gradients": "column_sums",
    "AdamW": "[Aa]dam",
    "cuBLAS": "nvjet|gemm|gemv|cutlass|cublas|splitK",
    "others": "",
}
FLOORS = ("floor-folded", "floor")
# the model in TrainStep, in the plain loop under model.graphs and without, and compiled
LOOPS = (
    *("fused", "fused-graphs", "fused-eager"),
    *("fused-compiled", "fused-reduce-overhead-compiled"),
)
TRAIN_STEPS = ("fused", "fused-without")
OTHERS = (
    *("reference-compiled", "reference"),
    *("repaired-compiled", "upstream-compiled", "upstream"),
)
WITH_GRAPHS = (*TRAIN_STEPS, "fused-graphs", "fused-reduce-overhead-compiled")


def step_line(row: dict, rows: list[dict], results: dict) -> dict:
    floor, bound = find(rows, row, *FLOORS).get("ms"), bound_ms(row, rows, results)
    upstream = find(rows, row, "upstream").get("ms")
    first = f"{number(row.get('first_steps_s'))} {row.get('caches', '')}"
    return {
        "config": row["config"],
        "provider": row["provider"],
        "step (ms)": number(row.get("ms")),
        "of the host (ms)": number(row.get("host_ms")),
        "over floor (x)": number(ratio(row.get("ms"), floor)),
        "over bound (x)": number(ratio(row.get("ms"), sum(bound.values()))),
        "over TrainStep (x)": number(ratio(row.get("ms"), find(rows, row, "fused").get("ms"))),
        "speed-up over upstream (x)": number(ratio(upstream, row.get("ms"))),
        "throughput (tokens/s)": number(row.get("tokens_per_s")),
        "peak memory (GiB)": number(row.get("peak_gib")),
        "first step (s)": number(row.get("first_step_s")),
        "first two steps (s)": first.strip(),
    }


def bound_ms(row: dict, rows: list[dict], results: dict) -> dict[str, float]:
    """Parts of the bound of what a row measures; none where its floor was not measured."""
    rate = find(rows, row, *FLOORS).get("gemm_tflop_per_s")
    device = "cpu" if results["small_shapes"] else "cuda"
    return bound_of(row["config"], device, rate, results["copy_gb_per_s"]) if rate else {}


@lru_cache(64)
def bound_of(config: str, device: str, tflop_per_s: float, gb_per_s: float) -> dict[str, float]:
    return shapes.bound(shapes.configs(device)[config], tflop_per_s, gb_per_s)


def sums_line(parts: dict[str, float], config: str, whole: str) -> dict | None:
    """The sum of the parts and each of them; None where there are none."""
    line = {"config": config, f"{whole} (ms)": number(sum(parts.values()))}
    return line | {f"{part} (ms)": number(ms) for part, ms in parts.items()} if parts else None


def bound_line(row: dict, rows: list[dict], results: dict) -> dict | None:
    is_floor = row == find(rows, row, *FLOORS)
    parts = bound_ms(row, rows, results) if is_floor else {}
    return sums_line(parts, row["config"], "bound")


def parts_line(row: dict, rows: list[dict], results: dict) -> dict | None:
    return sums_line(row.get("parts_ms", {}), row["config"], "all kernels")


STEPS_TITLE = (
    "Train step; floor: its matrix products through cuBLAS, and AdamW; bound: those products, and"
    " once through memory what no product can hide"
)
BOUND_TITLE = "What the bound of a train step is made of, at the rates of its floor and of a copy"
BENCHMARK = Benchmark(
    (*FLOORS, *LOOPS, *OTHERS),
    (
        Table(STEPS_TITLE, step_line),
        Table(BOUND_TITLE, bound_line),
        Table("What the kernels of the fused train step take", parts_line),
    ),
    place=1,
    peers={"repaired-compiled": None},  # FlexAttention has no backward on a CPU
    has=lambda provider, config: (
        provider != "floor-folded" or shapes.foldable(shapes.CONFIGS[config])
    ),
    first_steps=True,
    chart=partial(bars, "ms", "step (ms), lower is better"),
)


def bench_model(benchmark, config, provider, wait_for_turn):
    config = shapes.configs(DEVICE)[config]
    step = measure(benchmark, config, provider, wait_for_turn, build_reference, load)
    if provider == "fused" and DEVICE == "cuda":
        benchmark.extra_info["parts_ms"] = by_part(kernel_ms(step))


def measure(
    benchmark,
    config: shapes.Config,
    provider: str,
    wait_for_turn: Callable,
    build_reference: Callable,
    load: Callable,
) -> Callable:
    """Add what was measured to the benchmark, and return the step.

    build_reference: makes the model of a configuration.
    load: makes the provider's model of it, as `providers.load`.
    """
    benchmark.extra_info |= {"batch": config.batch, "seq_len": config.model["seq_len"]}
    if provider in FLOORS:
        step = time_floor(benchmark, config, folded=provider == "floor-folded")
    else:
        step = time_step(benchmark, config, provider, wait_for_turn, build_reference, load)
    tokens = config.batch * config.model["seq_len"]
    benchmark.extra_info["tokens_per_s"] = tokens / benchmark.extra_info["ms"] * 1e3
    return step


def time_step(benchmark, config, provider, wait_for_turn, build_reference, load):
    reference = build_reference(config)
    size = (config.batch, config.model["seq_len"] + 1)
    ids = torch.randint(1, config.model["num_tokens"], size, device=DEVICE)
    with torch.no_grad(), autocast():
        expected = float(reference(ids, return_loss=True)[0])

    model = load(provider, reference, config)
    del reference
    graph_by_hand = provider.endswith("-compiled") and provider not in LOOPS and DEVICE == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=graph_by_hand)
    if provider in TRAIN_STEPS:
        train_step = TrainStep(
            model, optimizer, precision="bf16-mixed" if DEVICE == "cuda" else "fp32"
        )

    def step():
        if provider in TRAIN_STEPS:
            return train_step(ids)[0]
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with autocast():
            loss, _ = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    reset_peak()
    start = time.perf_counter()
    loss = float(step())
    if not abs(loss - expected) <= 2e-2 * abs(expected):
        raise ValueError(f"loss {loss:.4f} disagrees with the reference's {expected:.4f}")
    first_step_s = time.perf_counter() - start
    step()  # upstream compiles twice, TrainStep captures
    synchronize()
    first_steps_s = time.perf_counter() - start

    optimizer.zero_grad()
    wait_for_turn()
    if provider not in WITH_GRAPHS:  # replays allocate nothing: their captures did
        reset_peak()
    step()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    timed, with_graph = faster_with_or_without_graph(step) if graph_by_hand else (step, False)
    (ms,) = median_ms(benchmark, timed)
    host = host_ms(timed)
    if not math.isfinite(last := float(step())):
        raise ValueError(f"loss became {last}")
    benchmark.extra_info |= {
        "ms": ms,
        "host_ms": host,
        "peak_gib": peak,
        "cuda_graph": with_graph or DEVICE == "cuda" and provider in WITH_GRAPHS,
        "first_step_s": first_step_s,
        "first_steps_s": first_steps_s,
        "loss": loss,
        "reference_loss": expected,
    }
    return step


def by_part(kernels: dict[str, float]) -> dict[str, float]:
    """Times by name of kernel, added up to those of PARTS."""
    parts = dict.fromkeys(PARTS, 0.0)
    for name, ms in kernels.items():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += ms
    return parts


def reset_peak():
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def faster_with_or_without_graph(step: Callable) -> tuple[Callable, bool]:
    """The step or a CUDA graph of it, whichever takes less time, and whether that is the graph."""
    try:
        replay = graphed([step])
    except RuntimeError as error:  # it waits for the GPU somewhere
        print(f"no CUDA graph of this step: {error}")
        return step, False

    def seconds(fn):
        synchronize()
        start = time.perf_counter()
        for _ in range(5):
            fn()
        synchronize()
        return time.perf_counter() - start

    for fn in (step, replay):
        fn()
    return (replay, True) if seconds(replay) < seconds(step) else (step, False)


def time_floor(benchmark, config, folded):
    random = lambda *size: torch.randn(size, dtype=DTYPE, device=DEVICE)
    products = shapes.products(config, folded)
    operands = {}
    for _, m, k, n, _ in products:
        # two sets, so that a product does not find its operands in the cache
        operands[m, k, n] = [(random(m, k), random(n, k), random(m, n)) for _ in range(2)]

    def step():
        calls = [operands[p[1:4]][i % 2] for p in products for i in range(p.times)]
        for x, w, _ in calls:
            x @ w.T
        for x, w, dy in reversed(calls):
            dy @ w
            dy.T @ x

    count = sum(p.numel() for p in shapes.on_meta(config).parameters())
    parameter = torch.nn.Parameter(torch.randn(count, device=DEVICE))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)

    gemm_ms, adamw_ms = median_ms(benchmark, graphed([step]), optimizer.step)
    benchmark.extra_info |= {
        "ms": gemm_ms + adamw_ms,
        "gemm_ms": gemm_ms,
        "adamw_ms": adamw_ms,
        "gemm_tflop_per_s": 3 * shapes.flops(products) / gemm_ms / 1e9,
        "parameters": count,
    }
    return step
