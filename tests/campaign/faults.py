"""Faults of runs: kills, signals, full disks, starters that race, files that are damaged.

However a process ends, checkpoints stay whole, and the run goes on to the end that it would have
had.
"""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count, product
from pathlib import Path
from random import Random

from helpers import ROOT, child_environment
from running import TINY, rows, write_text
from test_hostile import DAMAGE

from shtx.train import TrainError, visible
from shtx.train.checkpoint import CHECKPOINTS, find_steps, load, step_of
from shtx.train.home import RUN
from tests.campaign import Case
from tests.campaign.processes import PATIENCE, Child, Ended, shtx_command

WEIGHTS = ("model.safetensors", "optimizer.pt")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Runs:
    """A text, and the run that trains on it to its end undisturbed.

    Args:
        folder: where all runs go.
        world: processes of a run.
    """

    def __init__(self, folder: Path, world: int = 1):
        folder.mkdir()
        self.folder, self.world = folder, world
        self.text = write_text(folder / "text")
        self.whole = folder / "whole"
        start = time.monotonic()
        for ended in self.wait(self.start(self.whole)):
            if ended.status:
                raise RuntimeError(f"the undisturbed run ended with {ended}")
        self.seconds = time.monotonic() - start
        self.rows, self.last = rows(self.whole), self.content(self.whole)

    def arguments(self, out: Path) -> list:
        """The arguments that start the run in `out`, or go on with it where it has begun."""
        if (out / RUN).exists():
            return ["train", "--resume", out]
        return ["train", *TINY, "--data", self.text, "--out", out]

    def start(self, out: Path, prepare=lambda: None) -> list[Child]:
        if self.world == 1:
            return [Child(self.arguments(out), self.folder, prepare)]
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])
        group = dict(WORLD_SIZE=str(self.world), MASTER_ADDR="localhost", MASTER_PORT=port)
        return [
            Child(
                self.arguments(out), self.folder, prepare, RANK=str(r), LOCAL_RANK=str(r), **group
            )
            for r in range(self.world)
        ]

    def wait(self, children: list[Child]) -> list[Ended]:
        return [child.wait() for child in children]

    def content(self, out: Path) -> list[bytes]:
        return [(load(out).path / name).read_bytes() for name in WEIGHTS]

    def lost(self, out: Path, before: int) -> str | None:
        """Say what is wrong with the checkpoints, whose newest was that of step `before`."""
        steps = find_steps(out / CHECKPOINTS)
        newest = step_of(steps[-1]) if steps else 0
        if newest < before:
            return f"the newest checkpoint is that of step {newest}, it was {before}"
        for step in steps:
            try:
                load(step)
            except TrainError as error:
                return str(error)
        return None

    def other_end(self, out: Path) -> str | None:
        """Say what is not as in the undisturbed run."""
        if self.content(out) != self.last:
            return "its weights are not those of the undisturbed run"
        if rows(out) != self.rows:
            return "its rows are not those of the undisturbed run"
        return None

    def newest(self, out: Path) -> int:
        steps = find_steps(out / CHECKPOINTS)
        return step_of(steps[-1]) if steps else 0

    def finish(self, out: Path) -> str | None:
        """Go on with the run, which nothing disturbs any more; what is wrong with its end."""
        for ended in self.wait(self.start(out)):
            if what := ended.unclear(0):
                return what
        return self.other_end(out)


def kills(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """kill -9 at random moments: of the first start, of those that go on, again and again."""
    return _disturbed(f"{seed} {numbers.start}", Runs(folder), 1)


def rank_kills(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """kill -9 of one process of two, whose other one a launcher then ends as torchrun does: by
    SIGTERM, and by SIGKILL if it waits for the dead one where Python cannot hear."""
    return _disturbed(f"{seed} {numbers.start}", Runs(folder, world=2), 2)


def _disturbed(seed: str, runs: Runs, world: int) -> Iterator[Case]:
    """A case is a kill, and what came of it: the run's end, too, where it was the last."""
    random = Random(seed)
    for chain in count():
        out, newest = runs.folder / f"run-{chain}", 0
        while True:
            finding, moment = None, random.uniform(0, 1.1 * runs.seconds)
            children = runs.start(out)
            time.sleep(moment)
            victim = random.randrange(world)
            killed = children[victim].kill(signal.SIGKILL)
            for child in children if killed else ():
                child.kill(signal.SIGTERM)  # the victim does not hear it any more
            ends = [child.wait(20 if killed else PATIENCE) for child in children]
            for index, ended in enumerate(ends):
                if index != victim:
                    terminated = 128 + signal.SIGTERM, -signal.SIGKILL
                    finding = finding or ended.unclear(0, 1, *terminated * killed)
                elif not killed:
                    finding = finding or ended.unclear(0)
            finding = finding or runs.lost(out, newest)
            newest = runs.newest(out)
            if last := not killed or bool(finding) or random.random() < 0.2:
                finding = finding or runs.finish(out)
            if finding:
                yield Case(f"{out.name}, moment {moment:.3f}: {finding}")
            elif killed:
                yield Case(figures={"runs to their ends": int(last)})
            if last:
                break
        shutil.rmtree(out, ignore_errors=True)


def signals(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """SIGINT, SIGTERM and SIGHUP at random moments, one in four twice."""
    runs, random = Runs(folder), Random(f"{seed} {numbers.start}")
    for chain in count():
        out = runs.folder / f"run-{chain}"
        (child,) = runs.start(out)
        sent, wait = [], random.uniform(0, 1.1 * runs.seconds)
        for _ in range(2 if random.random() < 0.25 else 1):
            time.sleep(wait)
            sent.append(random.choice(SIGNALS))
            if not child.kill(sent[-1]):
                sent.pop()
            wait = random.uniform(0, 0.05)
        ended = child.wait()
        finding = ended.unclear(0, *(128 + signum for signum in sent)) or runs.lost(out, 0)
        finding = finding or runs.finish(out)
        shutil.rmtree(out, ignore_errors=True)
        if sent or finding:
            yield Case(finding and f"{out.name}, {sent}: {finding}")


def signals_of_a_start(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Signals to a process that Python starts, while it imports; before that they are Python's."""
    runs = Runs(folder)
    for number in numbers:
        random = Random(f"{seed} {number}")
        out, signum = runs.folder / f"run-{number}", random.choice(SIGNALS)
        with subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "shtx", *map(str, runs.arguments(out))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(ROOT, OMP_NUM_THREADS="1"),
        ) as process:
            imports = random.randrange(200, 2000)  # the command's own are among the first
            for line in process.stderr:
                imports -= b"import time" in line
                if imports == 0:
                    break
            process.send_signal(signum)
            said = [line for line in process.stderr if b"import time" not in line]
            process.stdout.read()
        text = b"".join(said).decode()
        ended = Ended(process.returncode, "", text)
        finding = ended.unclear(0, 128 + signum) or runs.finish(out)
        shutil.rmtree(out, ignore_errors=True)
        yield Case(finding and f"{out.name}, {signum!r}: {finding}")


def full_disks(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """No room from the nth change of the directory on, for every n; no room in a file, from a
    random byte on."""
    runs, changes = Runs(folder), True
    for number in numbers:
        out, random = runs.folder / f"run-{number}", Random(f"{seed} {number}")
        if changes:
            fault, what = partial(_full_from, number, out), f"change {number}"
        else:
            size = random.randrange(400, 1 << random.randrange(9, 20))  # the error has room
            fault, what = partial(_largest_file, size), f"files of {size} bytes"
        (child,) = runs.start(out, fault)
        ended = child.wait()
        figures = {"changes of the directory": int(changes and ended.status != 0)}
        changes = changes and ended.status != 0  # until there were not as many as that
        finding = ended.unclear(0, 1)
        if out.exists():
            finding = finding or runs.lost(out, 0)
        finding = finding or runs.finish(out)
        shutil.rmtree(out, ignore_errors=True)
        yield Case(finding and f"{out.name}, {what}: {finding}", figures)


def _full_from(nth: int, out: Path) -> None:
    """Let the nth change below `out` and all later ones fail, as on a full disk."""
    done = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal done
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("os.mkdir", "os.rename", "os.truncate")
        if writes and str(args[0]).startswith(str(out)):
            done += 1
            if done > nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    sys.addaudithook(hook)


def _largest_file(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def races(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Two to four processes that start one run, or go on with it, together."""
    runs = Runs(folder)
    for number in numbers:
        random = Random(f"{seed} {number}")
        out, finding = runs.folder / f"run-{number}", None
        if random.random() < 0.5:  # some of them go on with it
            (child,) = runs.start(out)
            time.sleep(random.uniform(0.5, 1) * runs.seconds)
            child.kill(signal.SIGTERM)
            child.wait()
        newest = runs.newest(out)
        children = [runs.start(out)[0] for _ in range(random.randrange(2, 5))]
        ends = runs.wait(children)
        for ended in ends:
            finding = finding or ended.unclear(0, 1)
            if ended.status == 1 and not any(
                told in ended.err for told in ("another process trains", "holds a run")
            ):
                finding = f"said {ended.err!r}"
        if all(ended.status for ended in ends):
            finding = finding or f"nobody trained: {ends[0].err!r}"
        finding = finding or runs.lost(out, newest) or runs.other_end(out)
        shutil.rmtree(out, ignore_errors=True)
        yield Case(finding and f"{out.name}: {finding}")


def truncate(file: Path, random: Random) -> None:
    os.truncate(file, random.randrange(max(1, file.stat().st_size)))


def flip(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(random.choice((1, 1, 20))):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def append(file: Path, random: Random) -> None:
    with open(file, "ab") as opened:
        opened.write(random.randbytes(random.randrange(1, 2000)))


def overwrite(file: Path, random: Random) -> None:
    file.write_bytes(random.randbytes(random.randrange(2000)))


def remove(file: Path, random: Random) -> None:
    file.unlink()


def replace(file: Path, random: Random) -> None:
    """Replace a file by something that is no file of bytes."""
    file.unlink()
    kinds = (
        os.mkdir,
        os.mkfifo,
        lambda path: os.symlink(path, path),
        lambda path: os.symlink("/", path),
    )
    random.choice(kinds)(file)


def edit(file: Path, random: Random) -> None:
    """JSON that is still JSON, with a value of another kind somewhere."""
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return flip(file, random)
    at = value
    while isinstance(at, dict) and at:
        key = random.choice([*at])
        if not isinstance(at[key], dict) or random.random() < 0.2:
            at[key] = random.choice((None, -1, 1e400, "x", [], {}, True, [[1]], 10**30))
            break
        at = at[key]
    file.write_text(json.dumps(value))


DAMAGES = (truncate, flip, append, overwrite, remove, replace, edit)


def corruptions(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Every file of a run, damaged in every way. It goes on to the same end, or says in a line why
    it does not; with --resume-fallback it goes on from the checkpoint before."""
    runs = Runs(folder)
    files = sorted(p.relative_to(runs.whole) for p in runs.whole.rglob("*") if p.is_file())
    for number in numbers:
        out, random = runs.folder / f"run-{number}", Random(f"{seed} {number}")
        shutil.copytree(runs.whole, out)
        if random.random() < 0.5:  # it has something left to do
            shutil.rmtree(load(out).path)
        file = random.choice([file for file in files if (out / file).exists()])
        damage = random.choice(DAMAGES)
        damage(out / file, random)
        what = f"{out.name}, {damage.__name__} {file}"
        verb = random.choice(("resume", "resume", "fallback", "generate"))
        if verb == "generate":
            given = ["generate", "--checkpoint", out, "--prompt", "line", "--length", "3"]
        else:
            given = ["train", "--resume", out, *["--resume-fallback"] * (verb == "fallback")]
        ended = shtx_command(*given, folder=runs.folder)
        finding = ended.unclear(0, 1)
        went_on = ended.status == 0 and verb != "generate"
        if went_on and runs.content(out) != runs.last:
            finding = finding or "went on to another end, in silence"
        shutil.rmtree(out)
        figures = {"went on to the same end": int(went_on)}
        yield Case(finding and f"{what}, {verb}: {finding}", figures)


def hostile_checkpoints(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Pickles, gigantic headers, escapes, names that lead elsewhere, and what else the tests have:
    each refused in a line, by training and by sampling."""
    runs = Runs(folder)
    checkpoints = {
        **{what: (damage, True) for what, (damage, _) in DAMAGE.items()},
        "a manifest of files elsewhere": (elsewhere, True),
        "links out of the checkpoint": (links, False),
        "a name with escapes": (escapes, False),
    }
    for number, (verb, what) in enumerate(product(("train", "generate"), checkpoints)):
        if number not in numbers:
            continue
        damage, refused = checkpoints[what]
        out = runs.folder / "run"
        shutil.copytree(runs.whole, out)
        step = load(out).path
        step = damage(step) or step
        given = ["generate", "--checkpoint", step, "--prompt", "x", "--length", "1"]
        if verb == "train":
            given = ["train", "--resume", step]
        before = {*runs.folder.rglob("*")}
        ended = shtx_command(*given, folder=runs.folder, prepare=lambda: os.chdir(runs.folder))
        # a file that only training reads does not keep a model from sampling
        finding = ended.unclear(*((1,) if refused and verb == "train" else (0, 1)))
        if ended.status and {*runs.folder.rglob("*")} != before:
            finding = finding or "left something behind"
        if visible(ended.out) != ended.out:
            finding = finding or f"said {ended.out!r}"
        shutil.rmtree(out)
        yield Case(finding and f"{verb}, {what}: {finding}")


def elsewhere(step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    listed = {f"../../../{name}": value for name, value in manifest.items()}
    (step / "manifest.json").write_text(json.dumps(listed))


def links(step: Path) -> None:
    for name in WEIGHTS:
        (step / name).rename(step.parents[2] / f"outside-{name}")
        (step / name).symlink_to(step.parents[2] / f"outside-{name}")


def escapes(step: Path) -> Path:
    named = step.with_name("step-000012\x1b]0;evil\x07")
    step.rename(named)
    return named
