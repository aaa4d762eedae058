"""Run the campaign, or parts of it."""

import argparse
import json
import os
import subprocess
import tempfile
import time
import zlib
from dataclasses import asdict
from datetime import date
from pathlib import Path
from random import Random

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import triton
from helpers import ROOT

from tests.campaign import configurations, faults, mutations, sanitizers

# part -> how many cases of it are a campaign
PARTS = {
    faults.kills: 300,
    faults.rank_kills: 30,
    faults.signals: 100,
    faults.signals_of_a_start: 20,
    faults.full_disks: 100,
    faults.races: 20,
    faults.corruptions: 500,
    faults.hostile_checkpoints: 100,
    configurations.upstream: 2000,
    configurations.fused: 500,
    configurations.cached: 500,
    mutations.listed: 1000,
    mutations.drawn: 240,
    sanitizers.sanitizers: 4,
}
NAMES = {part.__name__: part for part in PARTS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--count", type=int, help="cases of each part, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("campaign.json"))
    parser.add_argument("--show", action="store_true", help="print the table of --out, run nothing")
    given = parser.parse_args()
    if unknown := set(given.parts) - NAMES.keys():
        parser.error(f"no part {', '.join(unknown)}; the parts are {', '.join(NAMES)}")
    return given


def commit() -> str:
    git = lambda *args: subprocess.check_output(["git", *args], cwd=ROOT, text=True).strip()
    return git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "-s") else "")


HEADER = "| part | tried | findings | seconds | commit | |\n|---|---:|---:|---:|---|---|"


def row(result: dict) -> str:
    cells = (
        *(result["name"], f"{result['tried']:,}", len(result["findings"]), result["seconds"]),
        *(result["commit"], result["notes"]),
    )
    return f"| {' | '.join(map(str, cells))} |"


def run(name: str, count: int, seed: int) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # a part draws the same whichever others are run
        random = Random(seed + zlib.crc32(name.encode()))
        part = NAMES[name](count, random, Path(folder) / name)
    return asdict(part) | {
        "seconds": round(time.monotonic() - start),
        "seed": seed,
        "commit": commit(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def main() -> int:
    given = arguments()
    parts = json.loads(given.out.read_text()) if given.out.exists() else {}
    print(HEADER, flush=True)
    if given.show:
        print("\n".join(row(parts[name]) for name in NAMES if name in parts))
        return 0
    findings = 0
    for name in given.parts or NAMES:
        parts[name] = run(name, given.count or PARTS[NAMES[name]], given.seed)
        given.out.write_text(json.dumps(parts, indent=1) + "\n")
        print(row(parts[name]), *parts[name]["findings"], sep="\n  ", flush=True)
        findings += len(parts[name]["findings"])
    return int(findings > 0)


if __name__ == "__main__":
    raise SystemExit(main())
