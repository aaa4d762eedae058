"""The command line: `shtx train` of configuration C on 1, 2, 4, ... GPUs, as many as there are, and
with another optimizer; and `shtx eval` beside the forward of training.

The batch a GPU stays that of the configuration. Rates are those that a run writes of itself, the
median of its second half, so that they hold all that a run does between two steps. `eval` scores
every byte of a file once, window after window, and counts all from its start.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import shtx
from benchmarks import shapes
from benchmarks.bench_gpus import GPUS
from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import find, number, ratio
from benchmarks.timing import DEVICE, autocast, median_ms
from shtx.train.metrics import read

CONFIG = "C"
STEPS, LOG_EVERY = (400, 20) if DEVICE == "cuda" else (8, 2)
BYTES = 2**25 if DEVICE == "cuda" else 2**14  # that `eval` scores
WINDOWS = 16  # at a time, in `eval` and in the forward beside it


class Case(NamedTuple):
    gpus: int

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        return {"config": CONFIG, "variant": f"GPUs: {self.gpus}"}


CASES = {
    "adamw": [Case(gpus) for gpus in GPUS],
    "muon": [Case(1)],
    "eval": [Case(1)],
}


def line(row: dict, rows: list[dict], results: dict) -> dict:
    rate = row.get("tokens_per_s")
    one = find(rows, row | {"variant": "GPUs: 1"}, row["provider"]).get("tokens_per_s")
    adamw = find(rows, row, "adamw").get("tokens_per_s")
    forward = ratio(rate, row.get("forward_tokens_per_s"))
    return {
        "config": row["config"],
        "command": row["provider"],
        "GPUs": str(row.get("gpus", "-")),
        "rate (tokens/s)": number(rate),
        "over one GPU (x)": number(ratio(rate, one)),
        "over AdamW (x)": "-" if forward else number(ratio(rate, adamw)),
        "of the forward of training (%)": number(forward and 100 * forward),
    }


BENCHMARK = Benchmark(
    tuple(CASES),
    (Table("`shtx train`, by optimizer, and `shtx eval`", line),),
    place=6,
    fused=tuple(CASES),
    has=lambda provider, config: config == CONFIG,
)


def pytest_generate_tests(metafunc):
    [provider] = metafunc.config.getoption("--provider")
    metafunc.parametrize("case", CASES[provider], ids=lambda case: str(case.gpus))


def bench_train(benchmark, case, provider):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if provider == "eval":
            benchmark.extra_info |= evaluate(benchmark, run, Path(folder))
        else:
            train(run, case.gpus, "--optimizer", provider)
            rows = read(run / "metrics.jsonl")
            rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
            rate = median(rates[len(rates) // 2 :])
            benchmark.extra_info |= {"gpus": case.gpus, "tokens_per_s": rate}


def train(run: Path, gpus: int, *more: str) -> None:
    config = shapes.configs(DEVICE)[CONFIG]
    arguments = ["--preset", "gpu", "--batch-size", str(config.batch * gpus)]
    for name, value in config.model.items():
        if name != "num_tokens":  # that of bytes
            values = value if isinstance(value, tuple) else [value]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    if DEVICE == "cpu":
        arguments += ["--device", "cpu", "--precision", "fp32"]
    arguments += ["--steps", str(STEPS), "--log-every", str(LOG_EVERY), "--eval-every", str(STEPS)]
    arguments += ["--save-every", str(STEPS), "--eval-sequences", "8", "--out", str(run)]
    call("train", *arguments, *more, gpus=gpus)


def evaluate(benchmark, run: Path, folder: Path) -> dict:
    train(run, 1)
    data, out = folder / "bytes.bin", folder / "eval.json"
    data.write_bytes(torch.randint(256, (BYTES,), dtype=torch.uint8).numpy().tobytes())
    context = shapes.configs(DEVICE)[CONFIG].model["seq_len"]
    options = ["--checkpoint", run, "--data", data, "--raw", "--out", out]
    options += ["--context", context, "--stride", context, "--batch-size", WINDOWS]
    call("eval", *map(str, options))
    figures = json.loads(out.read_text())

    model = shtx.load(run).to(DEVICE)
    ids = torch.randint(256, (WINDOWS, context + 1), device=DEVICE)

    def forward():
        with autocast():
            model(ids, return_loss=True)

    [ms] = median_ms(benchmark, forward)
    return {
        "gpus": 1,
        "tokens_per_s": figures["bytes"] / figures["seconds"],
        "forward_tokens_per_s": WINDOWS * context / ms * 1e3,
    }


def call(command: str, *arguments: str, gpus: int = 1) -> None:
    """Run a command of shtx, in as many processes as GPUs.

    Raises:
        RuntimeError: with the last line that a command which fails has written.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"]
    called = [sys.executable, "-m", *(torchrun if gpus > 1 else []), "shtx", command, *arguments]
    done = subprocess.run(called, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"shtx {command}: exit status {done.returncode}: {' '.join(last)}")
