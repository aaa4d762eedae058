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
from functools import partial
from pathlib import Path
from random import Random

from helpers import ROOT, child_environment
from running import TINY, rows, write_text
from test_hostile import DAMAGE

from shtx.train import TrainError, visible
from shtx.train.checkpoint import CHECKPOINTS, find_steps, load, step_of
from shtx.train.home import RUN
from tests.campaign import Part
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
        """What starts the run in `out`, or goes on with it where it has begun."""
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
        """What is wrong with the checkpoints, of which the newest was that of step `before`."""
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
        """What is not as in the undisturbed run."""
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


def kills(count: int, random: Random, folder: Path) -> Part:
    """kill -9 at random moments: of the first start, of those that go on, again and again."""
    return _disturbed("kill -9", count, random, Runs(folder), 1)


def rank_kills(count: int, random: Random, folder: Path) -> Part:
    """kill -9 of one process of two, whose other one a launcher then ends as torchrun does: by
    SIGTERM, and by SIGKILL if it waits for the dead one where Python cannot hear."""
    return _disturbed("kill -9 of one of two", count, random, Runs(folder, world=2), 2)


def _disturbed(name: str, count: int, random: Random, runs: Runs, world: int) -> Part:
    part, chain = Part(name), 0
    while part.tried < count:
        out, newest, chain, finding = runs.folder / f"run-{chain}", 0, chain + 1, None
        while part.tried < count and not finding:
            moment = random.uniform(0, 1.1 * runs.seconds)
            children = runs.start(out)
            time.sleep(moment)
            victim = random.randrange(world)
            killed = children[victim].kill(signal.SIGKILL)
            for child in children if killed else ():
                child.kill(signal.SIGTERM)  # the victim does not hear it any more
            ends = [child.wait(20 if killed else PATIENCE) for child in children]
            part.tried += killed
            for index, ended in enumerate(ends):
                if index != victim:
                    terminated = 128 + signal.SIGTERM, -signal.SIGKILL
                    finding = finding or ended.unclear(0, 1, *terminated * killed)
                elif not killed:
                    finding = finding or ended.unclear(0)
            finding = finding or runs.lost(out, newest)
            newest = runs.newest(out)
            if not killed or random.random() < 0.2:
                break
        if finding := finding or runs.finish(out):
            part.findings.append(f"{out.name}, kill {part.tried}: {finding}")
        else:
            shutil.rmtree(out)
    part.notes = f"{chain} runs to their ends"
    return part


def signals(count: int, random: Random, folder: Path) -> Part:
    """SIGINT, SIGTERM and SIGHUP at random moments, one in four twice."""
    runs, part = Runs(folder), Part("signals")
    while part.tried < count:
        out = runs.folder / f"run-{part.tried}"
        (child,) = runs.start(out)
        sent, wait = [], random.uniform(0, 1.1 * runs.seconds)
        for _ in range(2 if random.random() < 0.25 else 1):
            time.sleep(wait)
            sent.append(random.choice(SIGNALS))
            if not child.kill(sent[-1]):
                sent.pop()
            wait = random.uniform(0, 0.05)
        ended = child.wait()
        part.tried += bool(sent)
        finding = ended.unclear(0, *(128 + signum for signum in sent)) or runs.lost(out, 0)
        if finding := finding or runs.finish(out):
            part.findings.append(f"{out.name}, {sent}: {finding}")
        shutil.rmtree(out, ignore_errors=True)
    return part


def signals_of_a_start(count: int, random: Random, folder: Path) -> Part:
    """Signals to a process that Python starts, while it imports; before that they are Python's."""
    runs, part = (
        Runs(folder),
        Part("signals of a start", notes="the interpreter's own start left out"),
    )
    for part.tried in range(1, count + 1):
        out, signum = runs.folder / f"run-{part.tried}", random.choice(SIGNALS)
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
        if finding := ended.unclear(0, 128 + signum) or runs.finish(out):
            part.findings.append(f"{out.name}, {signum!r}: {finding}")
        shutil.rmtree(out, ignore_errors=True)
    return part


def full_disks(count: int, random: Random, folder: Path) -> Part:
    """No room from the nth change of the directory on, for every n; no room in a file, from a
    random byte on."""
    runs, part = Runs(folder), Part("full disk")
    changes, ended = 0, None
    while part.tried < count:
        out = runs.folder / f"run-{part.tried}"
        if ended is None or ended.status:  # until there were not as many changes as that
            fault = partial(_full_from, changes, out)
            what, changes = f"change {changes}", changes + 1
        else:
            size = random.randrange(400, 1 << random.randrange(9, 20))  # the error has room
            fault = partial(_largest_file, size)
            what = f"files of {size} bytes"
        (child,) = runs.start(out, fault)
        disturbed = child.wait()
        if what.startswith("change"):
            ended = disturbed
        part.tried += 1
        finding = disturbed.unclear(0, 1)
        if out.exists():
            finding = finding or runs.lost(out, 0)
        if finding := finding or runs.finish(out):
            part.findings.append(f"{out.name}, {what}: {finding}")
        shutil.rmtree(out, ignore_errors=True)
    part.notes = f"{changes - 1} changes of the directory, the others limits of a file's size"
    return part


def _full_from(nth: int, out: Path) -> None:
    """From here on, the nth change below `out` and all later ones fail as on a full disk."""
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


def races(count: int, random: Random, folder: Path) -> Part:
    """Two to four processes that start one run, or go on with it, together."""
    runs, part = Runs(folder), Part("races")
    for part.tried in range(1, count + 1):
        out, finding = runs.folder / f"run-{part.tried}", None
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
        if finding := finding or runs.lost(out, newest) or runs.other_end(out):
            part.findings.append(f"{out.name}: {finding}")
        shutil.rmtree(out, ignore_errors=True)
    return part


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
    """By what is no file of bytes."""
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


def corruptions(count: int, random: Random, folder: Path) -> Part:
    """Every file of a run, damaged in every way. It goes on to the same end, or says in a line why
    it does not; with --resume-fallback it goes on from the checkpoint before."""
    runs, part = Runs(folder), Part("corruptions")
    files = sorted(p.relative_to(runs.whole) for p in runs.whole.rglob("*") if p.is_file())
    went_on = 0
    for part.tried in range(1, count + 1):
        out = runs.folder / f"run-{part.tried}"
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
        if ended.status == 0 and verb != "generate":
            went_on += 1
            if runs.content(out) != runs.last:
                finding = finding or "went on to another end, in silence"
        if finding:
            part.findings.append(f"{what}, {verb}: {finding}")
        shutil.rmtree(out)
    part.notes = f"{went_on} of those that train went on to the same end"
    return part


def hostile_checkpoints(count: int, random: Random, folder: Path) -> Part:
    """Pickles, gigantic headers, escapes, names that lead elsewhere, and what else the tests have:
    each refused in a line, by training and by sampling."""
    runs, part = Runs(folder), Part("hostile checkpoints")
    checkpoints = {
        **{what: (damage, True) for what, (damage, _) in DAMAGE.items()},
        "a manifest of files elsewhere": (elsewhere, True),
        "links out of the checkpoint": (links, False),
        "a name with escapes": (escapes, False),
    }
    for what, (damage, refused) in [*checkpoints.items()][:count]:
        for verb in ("train", "generate"):
            out = runs.folder / "run"
            shutil.copytree(runs.whole, out)
            step = load(out).path
            step = damage(step) or step
            given = ["generate", "--checkpoint", step, "--prompt", "x", "--length", "1"]
            if verb == "train":
                given = ["train", "--resume", step]
            before = {*runs.folder.rglob("*")}
            ended = shtx_command(*given, folder=runs.folder, prepare=lambda: os.chdir(runs.folder))
            # what concerns training alone does not keep a model from sampling
            finding = ended.unclear(*((1,) if refused and verb == "train" else (0, 1)))
            if ended.status and {*runs.folder.rglob("*")} != before:
                finding = finding or "left something behind"
            if visible(ended.out) != ended.out:
                finding = finding or f"said {ended.out!r}"
            part.tried += 1
            if finding:
                part.findings.append(f"{verb}, {what}: {finding}")
            shutil.rmtree(out)
    return part


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
