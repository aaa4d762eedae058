"""The command line in a process of its own, forked from one that has imported everything."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

# the parent imports, and computes nothing: threads of PyTorch do not outlive a fork
import shtx.train.generate
import shtx.train.run  # noqa: F401
from shtx.cli import main
from shtx.train import trainer

SAMPLE = 16  # bytes: most of a small run is not to be its sample
PATIENCE = 120  # seconds, after which a process hangs
NUMBERS = count()


@dataclass
class Ended:
    """The end of a process: `status` is minus the number of the signal that killed it."""

    status: int
    out: str
    err: str

    def unclear(self, *allowed: int) -> str | None:
        """Say what is wrong with the end, if its status is not `allowed` or it was not told."""
        if self.status not in allowed:
            return f"ended with {self.status}: {self.err[-300:]!r}"
        lines = self.err.splitlines()
        if any(not line.startswith("shtx") or not line.isprintable() for line in lines):
            return f"said {self.err[-300:]!r}"
        if self.status == 1 and len([line for line in lines if ": error: " in line]) != 1:
            return f"ended with 1 and said {self.err[-300:]!r}"
        return None


class Child:
    """`shtx` with the arguments `argv`, in a process of its own.

    Args:
        argv: the arguments.
        folder: where its output goes.
        prepare: called in the process before the command.
        environment: variables of the process.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        folder: Path,
        prepare: Callable[[], None] = lambda: None,
        **environment: str,
    ):
        name = folder / f"output-{next(NUMBERS)}"
        self.files = [name.with_suffix(suffix) for suffix in (".out", ".err")]
        for file in self.files:
            file.touch()  # a process may be killed before it could
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._command([str(argument) for argument in argv], prepare, environment)

    def _command(self, argv: list[str], prepare: Callable[[], None], environment: dict) -> None:
        status = 1
        try:
            for descriptor, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(d, "w", closefd=False) for d in (1, 2))
            os.environ |= environment
            torch.set_num_threads(1)
            trainer.SAMPLE = SAMPLE
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
            prepare()
            status = main(argv)
            sys.stdout.flush()
        except SystemExit as exit:  # the usage was wrong
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stderr.flush()
            finally:  # whatever happens: the parent's code is not the child's
                os._exit(status)

    def kill(self, signum: int) -> bool:
        """Return whether there was still something to kill."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        os.kill(self.pid, signum)
        return True

    def wait(self, patience: float = PATIENCE) -> Ended:
        """The end; a process that hangs is killed."""
        deadline = time.monotonic() + patience
        while not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (file.read_text(errors="replace") for file in self.files)
        for file in self.files:
            file.unlink()
        return Ended(status, out, err)


def shtx_command(*argv: str | Path, folder: Path, **options) -> Ended:
    return Child(argv, folder, **options).wait()
