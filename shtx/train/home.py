"""The directory of a run: one process at a time writes there, and only what bears a run's names.

RUN/shtx.lock       locked while a process trains into RUN: its pid, its host, since when
    run.json        the run's id, which its checkpoints bear, and its settings
    metrics.jsonl   rows of steps and of validations
    checkpoints/    step-000123/ ..., see `checkpoint`
    data.bin        what was unpacked, for data that has no file of its own (val.bin, test.bin)
    loss.png        the plot
    tensorboard/    the rows for TensorBoard, where they are asked for
    wandb/          the same, for Weights & Biases
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from shtx.train import TrainError
from shtx.train.checkpoint import CHECKPOINTS, Checkpoint, find_steps, step_of
from shtx.train.files import make, publish, read_json, sync

LOCK, RUN, METRICS, PLOT = "shtx.lock", "run.json", "metrics.jsonl", "loss.png"
DATA = ("data.bin", "val.bin", "test.bin")
LOGS = ("tensorboard", "wandb")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Home:
    """The directory of a run, locked until the end of the context or of the process.

    Args:
        path: the directory; it is made if it is not there. None: runs/ and the time.
        flag: what named it, for messages.

    Attributes:
        path: the directory.
        begun: a process that has ended trained into it.
        id: of the run, once it has begun.
        best: the step of its best validation and the bits per byte, as its checkpoints tell; None
            before the first one.

    Raises:
        TrainError: another process trains into it; or it cannot be made or written.
    """

    def __init__(self, path: Path | None, flag: str = "--out"):
        self.made = path is None or not path.exists()
        self.path = _of_this_second(Path("runs")) if path is None else path
        self.name = f"{flag} {self.path}"
        try:
            make(self.path)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise TrainError(f"{self.name}: not writable")
            self.lock = self._lock()
        except BaseException as error:
            if self.made:
                with suppress(OSError):
                    self.path.rmdir()
            if isinstance(error, OSError):
                raise TrainError(f"{self.name}: {error.strerror}") from error
            raise
        self.best = None
        self.begun = self.kept = os.fstat(self.lock).st_size > 0
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "since": since})

    def _lock(self) -> int:
        file = self.path / LOCK
        while True:
            make(self.path)  # a process that failed may just have removed it
            try:
                lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(lock)
                os.close(lock)
                raise TrainError(
                    f"{self.name}: another process trains into it: {holder}; wait for its end, or"
                    " stop it"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                warnings.warn(
                    f"{self.path}: its file system has no locks; see to it that no other process"
                    " trains into it",
                    stacklevel=3,
                )
            if _same(lock, file):
                return lock
            os.close(lock)

    def _write(self, held: dict) -> None:
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, json.dumps(held).encode(), 0)

    def __enter__(self) -> "Home":
        return self

    def __exit__(self, *_) -> None:
        """Leave the lock to others; of a run that never began, leave no trace."""
        if _same(self.lock, self.path / LOCK):
            if self.kept:
                self._write({})
            else:
                (self.path / LOCK).unlink()
                if self.made:
                    with suppress(OSError):  # somebody put something there
                        self.path.rmdir()
        os.close(self.lock)

    def check(self) -> None:
        """Raise a TrainError if the directory was removed or replaced while the run went on."""
        if not _same(self.lock, self.path / LOCK):
            raise TrainError(
                f"{self.path}: was removed while the run went on: nothing can be saved"
            )

    def refuse_what_is_not_ours(self) -> None:
        """Raise a TrainError if a run that begins here would replace something.

        What a process left that ended before its first checkpoint is replaced.
        """
        held = self.holds_checkpoints()
        if held or (self.path / METRICS).exists() and not self.begun:
            remedy = f"continue it with --resume {self.path}, or name another" if held else ""
            raise TrainError(f"{self.name}: holds a run; {remedy or 'name another directory'}")
        for name in (RUN, *DATA, PLOT, *LOGS):
            if (self.path / name).exists() and not self.begun:
                raise TrainError(
                    f"{self.name}: holds {name}, which the run would replace;"
                    " name another directory"
                )

    def need_room(self, size: int, keep: int) -> None:
        """Raise a TrainError if the disk has no room for `keep` checkpoints, of `size` bytes each,
        and the one that is written.
        """
        there = min(len(find_steps(self.path / CHECKPOINTS)), keep)
        need, free = size * (keep + 1 - there), shutil.disk_usage(self.path).free
        if need > free:
            raise TrainError(
                f"{self.name}: checkpoints need {need / 1e9:,.3f} GB more, {free / 1e9:,.3f} GB are"
                " free on its disk"
            )

    def begin(self, config: dict, id: str | None, start: Path | None = None) -> None:
        """Write down whose directory this is; from here on it stays.

        Args:
            config: the settings, as JSON.
            id: of the run; None for one that had none when it began.
            start: the checkpoint that it begins with, of another run.
        """
        temporary = self.path / f"{RUN}.tmp"
        temporary.write_text(
            json.dumps({"id": id, "start": start and str(start), "run": config}, indent=2)
        )
        publish(temporary, self.path / RUN)
        self.id, self.kept = id, True

    def holds_checkpoints(self) -> bool:
        return bool(find_steps(self.path / CHECKPOINTS))

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def plot(self) -> Path:
        return self.path / PLOT


def new_id() -> str:
    return secrets.token_hex(8)


def home_of(path: Path) -> Path | None:
    """The directory of the run that --resume names: itself, or that of its checkpoint."""
    if step_of(path) is None:
        return path
    return path.parent.parent if path.parent.name == CHECKPOINTS else None


def settings(path: Path) -> dict | None:
    """Read the settings that `begin` wrote in the directory of a run; None if there are none."""
    try:
        written = read_json(path / RUN)
    except FileNotFoundError:
        return None
    if not isinstance(written.get("id"), str | None) or not isinstance(written.get("run"), dict):
        raise TrainError(f"{path / RUN}: damaged: not the settings of a run")
    return written


def origin(resumed: Path, checkpoint: Checkpoint) -> Path | None:
    """The directory of the run that a checkpoint belongs to; None for a copy of it elsewhere.

    Args:
        resumed: what --resume names, a run or one of its checkpoints.
        checkpoint: what was loaded from there.
    """
    home, id = home_of(resumed), checkpoint.config.get("id")
    if home is None:
        return None
    if written := settings(home):
        return home if written["id"] == id else None
    # older versions wrote neither run.json nor an id
    known = home == resumed or (id is None and (home / METRICS).is_file())
    return home if known else None


def _of_this_second(folder: Path) -> Path:
    """A new directory, which no other process gets."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        make(folder)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            with suppress(FileExistsError):
                (path := folder / f"{name}{suffix}").mkdir()
                sync(folder)
                return path
    except OSError as error:
        raise TrainError(f"{folder}: {error.strerror}; name a directory with --out") from error
    raise TrainError(f"{folder}: 999 runs began this second; name a directory with --out")


def _same(descriptor: int, file: Path) -> bool:
    try:
        there = os.stat(file, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _holder(lock: int) -> str:
    try:
        held = json.loads(os.pread(lock, 4096, 0))
        return f"pid {held['pid']} on {held['host']} since {held['since']}"
    except (ValueError, LookupError, TypeError):
        return "it has only begun"
