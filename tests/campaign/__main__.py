"""Run the campaign, or parts of it."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from itertools import islice
from pathlib import Path
from threading import Lock

# the command sets it, too, but finds PyTorch imported here
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import triton
from helpers import ROOT

from tests.campaign import Case, configurations, faults, mutations, sanitizers

# part -> its name in the table, how many cases of it are a campaign
PARTS = {
    faults.kills: ("kill -9", 300),
    faults.rank_kills: ("kill -9 of one of two", 30),
    faults.signals: ("signals", 100),
    faults.signals_of_a_start: ("signals of a start", 20),
    faults.full_disks: ("full disk", 100),
    faults.races: ("races", 20),
    faults.corruptions: ("corruptions", 500),
    faults.hostile_checkpoints: ("hostile checkpoints", 100),
    configurations.upstream: ("configurations: reference and upstream, fp64", 2000),
    configurations.fused: ("configurations: fused in fp32 and upstream in fp64", 500),
    configurations.cached: ("configurations: cached and uncached", 500),
    mutations.listed: ("mutations: listed", 1000),
    mutations.drawn: ("mutations: drawn", 240),
    sanitizers.sanitizers: ("sanitizers", 8),
}
NAMES = {part.__name__: part for part in PARTS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--count", type=int, help="cases of each part, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share a part's cases")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of a part; no case begins later"
    )
    parser.add_argument("--out", type=Path, default=Path("campaign.json"))
    parser.add_argument("--show", action="store_true", help="print the table of --out, run nothing")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - NAMES.keys():
        parser.error(f"no part {', '.join(unknown)}; the parts are {', '.join(NAMES)}")
    if given.jobs < 1:
        parser.error(f"--jobs is {given.jobs}; it has to be at least 1")
    return given


def commit() -> str:
    git = lambda *args: subprocess.check_output(["git", *args], cwd=ROOT, text=True).strip()
    return git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "-s") else "")


HEADER = "| part | tried | findings | seconds | commit | |\n|---|---:|---:|---:|---|---|"


def row(result: dict) -> str:
    figures = (
        f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.1e}"
        for name, value in result["figures"].items()
    )
    cells = (
        *(result["name"], f"{result['tried']:,}", len(result["findings"]), result["seconds"]),
        *(result["commit"], "; ".join(figures)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(parts: dict) -> str:
    return "\n".join([HEADER, *map(row, parts.values())])


def job(name: str, given: argparse.Namespace) -> None:
    """One process's share of a part: a line of JSON for each case."""
    end = time.monotonic() + given.seconds
    numbers = range(given.job, given.count, given.jobs)
    with tempfile.TemporaryDirectory() as folder:
        # a part draws the same whichever others are run, and however many share it
        cases = NAMES[name](numbers, f"{name} {given.seed}", Path(folder) / name)
        for case in islice(cases, len(numbers)):
            print(json.dumps(asdict(case)), flush=True)
            if time.monotonic() > end:
                break


def run(name: str, given: argparse.Namespace, parts: dict) -> None:
    """All cases of a part, into `parts`, which is written whenever a case has ended."""
    start, lock, (title, count) = time.monotonic(), Lock(), PARTS[NAMES[name]]
    count = given.count or count
    result = parts[name] = {
        "name": title,
        "tried": 0,
        "findings": [],
        "figures": {},
        "seed": given.seed,
        "commit": commit(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }

    def add(case: Case) -> None:
        result["tried"] += 1
        result["findings"] += [case.finding] if case.finding else []
        for what, value in case.figures.items():
            before, figures = result["figures"].get(what, 0), result["figures"]
            figures[what] = before + value if isinstance(value, int) else max(before, value)
        result["seconds"] = round(time.monotonic() - start)
        given.out.write_text(json.dumps(parts, indent=1) + "\n")

    def share(number: int) -> None:
        command = [sys.executable, "-W", "ignore::FutureWarning"]  # upstream's, as it is imported
        command += ["-m", "tests.campaign", name, "--job", number]
        command += ["--jobs", given.jobs, "--count", count, "--seconds", given.seconds]
        command += ["--seed", given.seed]
        with subprocess.Popen(
            [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout:
                with lock:
                    add(Case(**json.loads(line)))
        if process.returncode:
            with lock:
                add(Case(f"job {number} ended with {process.returncode}"))

    with ThreadPoolExecutor(given.jobs) as pool:
        [*pool.map(share, range(min(given.jobs, count)))]


def main() -> int:
    given = arguments()
    if given.job is not None:
        job(*given.parts, given)
        return 0
    parts = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.show:
        print(table(parts))
        return 0
    print(HEADER, flush=True)
    findings = 0
    for name in given.parts or NAMES:
        run(name, given, parts)
        print(row(parts[name]), *parts[name]["findings"], sep="\n  ", flush=True)
        findings += len(parts[name]["findings"])
    return int(findings > 0)


if __name__ == "__main__":
    raise SystemExit(main())
