"""The command: `python -m benchmarks --help`."""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import report
from benchmarks.benchmark import benchmarks, ops
from benchmarks.cells import key
from benchmarks.commit import resolve, stamp
from benchmarks.runner import Job, run
from benchmarks.shapes import CONFIGS
from benchmarks.timing import DEVICE

HERE = Path(__file__).parent
GIB_PER_COMPILATION = 25  # GPU memory: the most that a model's first steps take
STAMP_HELP = "what `python -m benchmarks commit` prints where git is, for a copy of the tree"
EXAMPLES = """examples:
  python -m benchmarks model --config A C --out results   train steps of two configurations
  PYTHONPATH=FOLDER python -m benchmarks next_latent        steps against upstream 0.4.0 in FOLDER
  python -m benchmarks scaling --out results                the step against batch and length
  python -m benchmarks gpus --out results                   the step on 1, 2, 4, ... GPUs
  python -m benchmarks train --out results                  `shtx train` on as many, `shtx eval`
  python -m benchmarks ops --op norm_token_shift            one op, against all its peers
  python -m benchmarks ops --provider fused --out results   rows that results.json there lacks
  python -m benchmarks model --compile-jobs 8               compile side by side, measure one by one
  python -m benchmarks table --out DIR                      tables and charts of results/*.json
  python -m benchmarks commit                               the commit, for --commit in a copy
A row whose benchmark failed has the reason in place of times; the exit status is then 1.
"""


def kinds_there_are() -> list[str]:
    return ["ops", *(name for name in benchmarks() if name not in ops())]


def check(name: str, got: list[str], allowed) -> list[str]:
    for value in got:
        if value not in allowed:
            sys.exit(f"{name}: {value!r} is unknown, choose from {' '.join(allowed)}")
    return list(dict.fromkeys(got))


def make_folder(option: str, path: Path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        sys.exit(f"{option}: {path}: {error.strerror}")


def save(results: dict, folder: Path):
    report.write(folder / "results.json", json.dumps(results, indent=1) + "\n")


def print_table(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks table", description="Results as Markdown tables."
    )
    add = parser.add_argument
    which = "to be joined; default: benchmarks/results/*.json, the newest first"
    add("files", nargs="*", type=Path, help=which)
    where = "the first file's train steps at a glance go between README's markers, all tables"
    where += " between ALL's"
    add("--write", type=Path, nargs=2, metavar=("README", "ALL"), help=where)
    add("--out", type=Path, metavar="DIR", help="for the joined results.json and its charts")
    options = parser.parse_args(argv)
    files = options.files or sorted((HERE / "results").glob("*.json"))
    if not files:
        sys.exit("benchmarks/results has no JSON file")
    machines = report.by_machine(map(report.read, files))
    if not options.files:
        machines.sort(key=lambda results: results["date"], reverse=True)
    tables = "\n\n".join(map(report.tables, machines))
    print(tables)
    texts = report.glance(machines[0]), tables
    for page, text in zip(options.write or (), texts, strict=False):
        try:
            report.write(page, report.splice(page.read_text(), text))
        except OSError as error:
            sys.exit(f"--write: {page}: {error.strerror}")
    if options.out:
        if len(machines) > 1:
            sys.exit(f"--out takes results of one machine, got those of {len(machines)}")
        make_folder("--out", options.out)
        save(machines[0], options.out)
        report.save_charts(machines[0], options.out)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure ops, train steps and generation; `table` prints results as Markdown.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND", help=f"of {' '.join(kinds_there_are())}; default: all")
    add(
        "--config", nargs="+", default=list(CONFIGS), metavar="NAME", help=f"of {' '.join(CONFIGS)}"
    )
    add("--op", nargs="+", default=ops(), metavar="NAME", help=f"of {' '.join(ops())}")
    add("--provider", nargs="+", metavar="NAME", help="default: all that suit the device")
    add("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="for results.json")
    add("--compile-jobs", type=int, default=1, metavar="N", help="models compiled side by side")
    add("--cache", type=Path, metavar="DIR", help="compiled code to keep; default: none is kept")
    add("--timeout", type=float, default=500, metavar="SECONDS", help="for a process")
    add("--commit", metavar="STAMP", help=STAMP_HELP)
    return parser.parse_args(argv)


def plan(options: argparse.Namespace) -> tuple[list[Job], list[dict]]:
    """List the jobs to run, and a row for each provider that cannot run on this machine."""
    kinds = check("KIND", options.kinds or kinds_there_are(), kinds_there_are())
    names = check("--config", options.config, CONFIGS)
    chosen = check("--op", options.op, ops())
    benches = [bench for kind in kinds for bench in (chosen if kind == "ops" else [kind])]
    known = list(dict.fromkeys(p for bench in benches for p in benchmarks()[bench].providers))
    asked = check("--provider", options.provider, known) if options.provider else None

    jobs, impossible = [], []
    for bench in benches:
        benchmark = benchmarks()[bench]
        wanted = [p for p in benchmark.providers if p in (asked or benchmark.by_default())]
        for together in [names] if bench in ops() else [[name] for name in names]:
            for provider in wanted:
                configs = tuple(name for name in together if benchmark.has(provider, name))
                if not configs:
                    continue
                job = Job(bench, configs, provider, benchmark.compiles(provider))
                reason = benchmark.why_not(provider)
                jobs += [job] * (reason is None)
                impossible += job.failed(reason) if reason else []
    return jobs, impossible


def summary(rows: list[dict]) -> str:
    failed = [row["error"] for row in rows if "error" in row]
    times = [f"{row['ms']:.3f} ms" for row in rows if "ms" in row]
    times += [f"{row['us_per_token']:.0f} us a token" for row in rows if "us_per_token" in row]
    said = "; ".join(failed or times) or f"{len(rows)} row{'s' * (len(rows) != 1)}"
    if len(rows) != 1:
        return said
    [row] = rows
    labels = [row[name] for name in ("shape", "variant") if name in row]
    seconds = [f"{phase} {s:.1f} s" for phase, s in row.get("seconds", {}).items()]
    return ", ".join([*labels, said]) + f" ({', '.join(seconds)})" * bool(seconds)


@contextmanager
def exit_at_sigterm() -> Iterator[None]:
    """Return a context in which SIGTERM raises, so that a time limit leaves the tables."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(options: argparse.Namespace) -> int:
    jobs, impossible = plan(options)
    if not jobs and not impossible:
        asked = " ".join(options.provider or ["none"])
        sys.exit(f"--provider: {asked} does not apply to this KIND and --config")
    path = options.out / "results.json"
    older = report.read(path) if path.exists() else None
    make_folder("--out", options.out)
    commit = resolve(options.commit)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, exit_at_sigterm():
        cache = options.cache or Path(folder, "cache")
        make_folder("--cache", cache)
        where = (Path(folder), cache.resolve(), options.timeout)

        [(_, [ceilings])] = run([Job("ceilings")], *where)
        if "error" in ceilings:
            sys.exit(f"the machine could not be measured: {ceilings['error']}")
        del ceilings["bench"]
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        results = {"commit": commit, "date": date, "small_shapes": DEVICE == "cpu"}
        results |= ceilings | {"rows": []}
        results = report.join(older, results) if older else results
        print(report.title(results), flush=True)

        def keep(rows):
            stamp = {"commit": commit, "date": date}
            report.add(results, [row | stamp for row in rows])
            save(results, options.out)

        present = {key(row) for row in results["rows"]}
        keep([row for row in impossible if key(row) not in present])
        compile_jobs = options.compile_jobs
        if memory := results["machine"]["gpu_memory_gib"]:
            compile_jobs = min(compile_jobs, max(1, memory // GIB_PER_COMPILATION))
        failures = 0
        try:
            with closing(run(jobs, *where, compile_jobs)) as running:
                for job, rows in running:
                    keep(rows)
                    failures += any("error" in row for row in rows)
                    print(f"[{time.monotonic() - began:4.0f} s] {job}: {summary(rows)}", flush=True)
        finally:
            print("\n" + report.tables(results), flush=True)
            report.save_charts(results, options.out)
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    if argv == ["commit"]:
        print(stamp())
        return 0
    return print_table(argv[1:]) if argv[:1] == ["table"] else measure(parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
