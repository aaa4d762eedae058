"""Each benchmark in a process of its own, one at a time; compiling alone goes on in several."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Job(NamedTuple):
    bench: str
    configs: tuple[str, ...] = ()
    provider: str = ""
    compiles: bool = False  # for long: can take its first steps beside others
    constants: str = ""  # those of a page of kernels to change, as `conftest.py` takes them

    def __str__(self):
        return " ".join(filter(None, (self.bench, "".join(self.configs), self.provider)))

    @property
    def marker(self) -> str:
        """File in Inductor's cache that says the job has run with it."""
        return "shtx-" + str(self).replace(" ", "-")

    def failed(self, reason: str) -> list[dict]:
        row = {"bench": self.bench, "provider": self.provider, "error": reason}
        return [row | {"config": config} for config in self.configs] or [row]


class Process:
    """A job under way: pytest on its file."""

    def __init__(self, job: Job, folder: Path, cache: Path, timeout: float, threads: int = 0):
        self.job, self.timeout, self.shares_cpu = job, timeout, threads > 0
        name = str(job).replace(" ", "-")
        self.rows, self.ready, self.log = (
            folder / f"{name}.{kind}" for kind in ("jsonl", "ready", "log")
        )
        command = [sys.executable, "-m", "pytest", "-c", HERE / "pytest.ini"]
        command += [HERE / f"bench_{job.bench}.py", "--rows", self.rows]
        command += ["--provider", job.provider]
        if job.configs:
            command += ["--config", ",".join(job.configs)]
        if job.constants:
            command += ["--constants", job.constants]
        if threads:
            command += ["--ready", self.ready]
        path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        # PYTEST_* is left out: options of a pytest that runs this are not for the benchmark.
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        env |= {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        if threads:
            env["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env
            )
        self.deadline = time.monotonic() + timeout

    def busy(self) -> bool:
        """Return whether it has neither ended nor waits for its turn; kill it past its time."""
        if self.process.poll() is not None or self.ready.exists():
            return False
        if time.monotonic() > self.deadline:
            self.kill()
            reason = f"no result within {self.timeout:.0f} s"
            if last := self.last_line():
                reason += f", the last line was: {last}"
            with self.log.open("a") as log:
                log.write(f"\n{reason}")
        return True

    def kill(self):
        self.process.kill()
        self.process.wait()

    def last_line(self) -> str | None:
        """Return what it wrote last, None if it wrote nothing."""
        lines = self.log.read_text().strip().splitlines()
        return lines[-1].lstrip(".") if lines else None  # pytest's, for the cases before

    def rows_so_far(self) -> list[dict]:
        text = self.rows.read_text() if self.rows.exists() else ""
        whole, _, _ = text.rpartition("\n")  # it may be writing a line
        return [json.loads(line) for line in whole.splitlines()]

    def finish(self) -> Iterator[list[dict]]:
        """Give it its turn, if it waits for one, and yield its rows as they come, some at a time,
        and no rows if it ends without any.
        """
        if self.ready.exists():
            self.deadline = time.monotonic() + self.timeout
            self.ready.unlink()
            with suppress(BrokenPipeError):
                self.process.stdin.write(b"\n")
                self.process.stdin.flush()
        known, busy = [], True
        while busy:
            if busy := self.busy():
                time.sleep(0.1)
            rows = self.rows_so_far()[len(known) :]
            failed = not busy and self.process.returncode
            if failed and not any("error" in row for row in known + rows):
                last = self.last_line() or "no output"
                rows += self.job.failed(f"exit status {self.process.returncode}: {last}"[:300])
            if rows or not (busy or known):
                yield rows
            known += rows


def run(
    jobs: list[Job], folder: Path, cache: Path, timeout: float, compile_jobs: int = 1
) -> Iterator[tuple[Job, list[dict]]]:
    """Each job with rows of it, as they come: several times, if they come one by one.

    With compile_jobs > 1, that many compiled train steps at a time take their first steps side by
    side. Each then waits, and is measured once all of them have compiled.
    """
    live = []

    def start(job, threads=0):
        print(f"{job} ...", flush=True)
        live.append(Process(job, folder, cache, timeout, threads))
        return live[-1]

    def finish(process):
        marker = cache / process.job.marker
        caches = "warm" if marker.exists() else "cold"
        caches += ", side by side" * process.shares_cpu
        for rows in process.finish():
            for row in rows:
                if "first_steps_s" in row:
                    row["caches"] = caches
                    marker.touch()
            yield process.job, rows
        live.remove(process)

    together = [job for job in jobs if job.compiles and compile_jobs > 1]
    try:
        for job in jobs:
            if job not in together:
                yield from finish(start(job))

        threads = max(1, 2 * os.cpu_count() // compile_jobs)
        compiling, compiled = [], []
        while together or compiling:
            if together and len(compiling) < compile_jobs:
                compiling.append(start(together.pop(0), threads))
            for process in [p for p in compiling if not p.busy()]:
                compiling.remove(process)
                compiled.append(process)
                state = "compiled" if process.ready.exists() else "ended"
                print(f"{process.job} {state}", flush=True)
            time.sleep(0.1)
        for process in compiled:
            yield from finish(process)
    finally:
        for process in live:
            process.kill()
            print(f"{process.job} was ended after: {process.last_line()}", flush=True)
