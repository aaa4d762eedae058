"""Does a hierarchy beat a flat model of as many parameters, at equal time and at equal FLOPs?

    python -m benchmarks.studies.quality.corpora CORPORA
    python -m benchmarks.studies.quality CORPORA OUT --minutes 10
    python -m benchmarks.studies.quality --report OUT... --page benchmarks/results/quality

Trains every run of runs.py that OUT has no result of, one on each GPU at a time, for so many
minutes of steps, and scores its best checkpoint on the test part: OUT/NAME.json. How many steps
that are is measured before. The report joins the results of all directories into results.json,
with tables and a plot.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import torch

from benchmarks.__main__ import STAMP_HELP, make_folder
from benchmarks.commit import resolve
from benchmarks.report import write
from benchmarks.studies.quality import report
from benchmarks.studies.quality.runs import BATCH, RUNS, SEQ_LEN, Run
from shtx.train.checkpoint import find, peek
from shtx.train.config import settings_of
from shtx.train.metrics import read
from shtx.train.speed import flops_of

PROBE = 60  # steps whose speed is measured; the last of them count
CURVE = 200  # points


def shtx(folder: Path, gpu: int | None, *arguments) -> None:
    """Run a verb of the command; its words go into a file of the folder."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    command = [sys.executable, "-m", "shtx", *map(str, arguments)]
    with open(folder / "log.txt", "a") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def train(corpus: Path, folder: Path, gpu: int | None, settings: dict) -> Path:
    """Return where the run is."""
    file, out = folder / "settings.json", folder / f"steps-{settings['steps']}"
    file.write_text(json.dumps(settings))
    shtx(folder, gpu, "train", "--config", file, "--data", corpus, "--out", out)
    return out


def measure(run: Run, corpora: Path, folder: Path, gpu: int | None, minutes: float) -> dict:
    """Train, and return the row of results."""
    corpus = corpora / f"{run.corpus}.bin"
    probe = train(corpus, folder, gpu, run.settings(PROBE, validations=1))
    rows = read(probe / "metrics.jsonl")
    speed = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][-1]
    steps = max(PROBE + 1, int(minutes * 60 * speed / (BATCH * SEQ_LEN)))
    out = train(corpus, folder, gpu, run.settings(steps))
    best, scores = find(out, "best"), folder / "test.json"
    sizes = "--context", SEQ_LEN, "--stride", SEQ_LEN // 4
    shtx(folder, gpu, "eval", "--checkpoint", best, "--split", "test", *sizes, "--out", scores)
    return row_of(run, out, json.loads(scores.read_text()))


def row_of(run: Run, out: Path, scores: dict) -> dict:
    """Return a row of results: the scores of a run, and how much time and data they took."""
    config = settings_of(peek(find(out)))
    with torch.device("meta"):
        model = config.model.kind(impl="reference", **config.model.arguments())
    seconds, curve = 0.0, []
    rows = read(out / "metrics.jsonl")
    for row in rows:
        if "tokens_per_second" in row:
            seconds += BATCH * SEQ_LEN / row["tokens_per_second"]
        else:
            curve.append((row["step"], seconds, row["val_bits_per_byte"]))
    every = max(1, len(rows) // CURVE)
    training = [(row["step"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    return (
        run._asdict()
        | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "flop_per_byte": flops_of(config) / (BATCH * SEQ_LEN),
            "steps": rows[-1]["step"],
            "bytes": rows[-1]["step"] * BATCH * SEQ_LEN,
            "seconds": seconds,
            "curve": curve,  # (step, seconds of steps until then, bits per byte in validation)
            "training": training[every - 1 :: every],
            "best_step": scores["step"],
            "test_bits_per_byte": scores["bits_per_byte"],
            "test_bytes": scores["bytes"],
            "sha256": scores["data"]["sha256"],
            "device": scores["device"],
            "versions": scores["versions"],
        }
    )


def work(gpu: int | None, waiting: queue.Queue, options: argparse.Namespace, failed: list) -> None:
    """Take run after run."""
    while True:
        try:
            run = waiting.get_nowait()
        except queue.Empty:
            return
        folder = options.out / "runs" / run.name
        # A run that was cut off may have left files, which would be in the way.
        shutil.rmtree(folder, ignore_errors=True)
        make_folder("OUT", folder)
        try:
            row = measure(run, options.corpora, folder, gpu, options.minutes)
        except (subprocess.CalledProcessError, OSError, LookupError, ValueError) as error:
            failed.append(run.name)
            print(f"{run.name}: {error}, see {folder}/log.txt", flush=True)
            continue
        row |= {"minutes": options.minutes, "commit": options.commit}
        write(options.out / f"{run.name}.json", json.dumps(row) + "\n")
        print(f"{run.name}: {row['test_bits_per_byte']:.4f} test bits per byte", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, or report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, [run.name for run in RUNS]
    add("corpora", nargs="?", type=Path, metavar="CORPORA", help="directory of the corpora")
    add("out", nargs="?", type=Path, metavar="OUT", help="directory for results and runs")
    add("--minutes", type=float, default=10.0, help="of training a run; default: 10")
    add("--gpus", type=int, default=torch.cuda.device_count(), help="default: all")
    add("--runs", nargs="+", metavar="NAME", default=names, help=f"of {' '.join(names)}")
    add("--commit", metavar="STAMP", help=STAMP_HELP)
    add("--report", nargs="+", type=Path, metavar="OUT", help="results to be joined; trains none")
    add("--page", type=Path, metavar="DIR", help="for --report: where results and plot go")
    options = parser.parse_args(argv)
    if options.report:
        if options.page is None:
            parser.error("--report needs --page DIR")
        report.save(report.joined(options.report), options.page)
        return 0
    if options.out is None:
        parser.error("CORPORA and OUT must be given, or --report")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if unknown := [name for name in options.runs if name not in names]:
        parser.error(f"--runs: {unknown[0]!r} is unknown, choose from {' '.join(names)}")
    wanted = [run for run in RUNS if run.name in options.runs]
    for corpus in {run.corpus for run in wanted}:
        if not (options.corpora / f"{corpus}.bin").exists():
            parser.error(f"CORPORA: {options.corpora / corpus}.bin does not exist")
    options.commit = resolve(options.commit)
    make_folder("OUT", options.out)
    waiting, failed = queue.Queue(), []
    for run in wanted:
        if not (options.out / f"{run.name}.json").exists():
            waiting.put(run)
    gpus = range(options.gpus) if options.gpus else [None]
    threads = [threading.Thread(target=work, args=(gpu, waiting, options, failed)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
