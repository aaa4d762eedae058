"""The `shtx` command: finds the verb, and imports only what that verb needs."""

import os
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

from shtx import __version__
from shtx.train import OUT_OF_MEMORY, TrainError, visible
from shtx.train.stop import SIGNALS, Stop, name

TRAIN_EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "numpy")
# A verb is the `main(argv)` of its module. It returns the exit status, which is 0 unless its
# docstring says more; a TrainError or an OSError that it raises says in one line what went wrong.
MODULES = {
    "train": "shtx.train.run",
    "warmup": "shtx.train.warmup",
    "generate": "shtx.train.generate",
    "eval": "shtx.train.evaluate",
    "data": "shtx.train.describe",
    "convert": "shtx.train.convert",
    "info": "shtx.info",
}

HELP = """\
usage: shtx {train,warmup,generate,eval,data,convert,info} [options]
       shtx --version

  train      train a byte-level hierarchical transformer, from nothing or from a checkpoint
  warmup     compile ahead what a training with the same options would compile
  generate   text from a checkpoint, as it is sampled
  eval       bits per byte of a checkpoint's model over a file
  data       what files to train on hold; `shtx data prepare` makes token ids of them
  convert    weights for the other version of simple-hierarchical-transformer, or transformers
  info       versions, device, which ops run fused; --check compares them with their references,
              --checkpoint names what of a checkpoint's model does not

examples:
  shtx train                          this Python's own sources, on whatever device is there
  shtx train --data enwik8.zip --steps 1000
  shtx train --resume runs/enwik8
  shtx generate --checkpoint runs/enwik8 --prompt "The city of" --length 1000
  shtx eval --checkpoint runs/enwik8 --data test.txt
  shtx data enwik8.zip --split 0.9 0.05 0.05
  shtx info --check
  shtx info --checkpoint runs/enwik8

`shtx <verb> --help` lists the options of a verb; `--traceback` with any verb shows where in the
code an error arose.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments after the program's name; None means those of this process.

    Returns:
        the exit status: 0 done, 1 failed, 2 wrong usage; 129, 130 or 143 stopped by SIGHUP, SIGINT
        or SIGTERM; 141 where nobody reads the output any longer, as behind `| head`.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an encoding without a character shows its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        status = dispatch(*((sys.argv[1:] if argv is None else argv) or ["--help"]))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, or a terminal that is gone
        status = fail("", f"output: {error.strerror}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    return status


def dispatch(verb: str, *rest: str) -> int:
    if verb in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if verb == "--version":
        print(f"shtx {__version__}")
        return 0
    if verb not in MODULES:
        *others, last = MODULES
        return fail("", f"unknown verb {verb!r}; the verbs are {', '.join(others)} and {last}")
    needs_extra = verb != "info" or any(a.startswith("--checkpoint") for a in rest)
    missing = [name for name in TRAIN_EXTRA if needs_extra and find_spec(name) is None]
    if missing:
        return fail(verb, f'{", ".join(missing)} not installed: pip install "shtx[train]"')
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: tell(verb, "warning", str(message))
        return run(verb, [argument for argument in rest if argument != "--traceback"], rest)


def run(verb: str, argv: list[str], given: tuple[str, ...]) -> int:
    if "--traceback" not in given:
        # else a process whose peer is killed while they meet logs frames of C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with EndAtOnce(verb):
        module = import_module(MODULES[verb])
    with Stop(at_once=True) as stop:
        try:
            return module.main(argv)
        except (KeyboardInterrupt, Exception) as error:
            if "--traceback" in given:
                traceback.print_exc()
            if isinstance(error, BrokenPipeError):
                raise
            # other code may have replaced the exception on its way, so the signal is looked up
            signum = getattr(error, "signum", stop.signum) or isinstance(error, KeyboardInterrupt)
            if not signum:
                return fail(verb, explain(verb, error))
            signum = signal.SIGINT if signum is True else signum
            say(f"shtx {verb}: {name(signum)}{getattr(error, 'advice', '')}")
            return 128 + signum


class EndAtOnce:
    """End the process at a signal while modules are imported, where an exception could get lost."""

    def __init__(self, verb: str):
        self.verb = verb

    def __enter__(self):
        hangup = signal.getsignal(signal.SIGHUP)
        caught = [s for s in SIGNALS if s != signal.SIGHUP or hangup is not signal.SIG_IGN]
        self.previous = {s: signal.signal(s, self.end) for s in caught}

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def end(self, signum: int, frame):
        say(f"shtx {self.verb}: {name(signum)} before it began")
        os._exit(128 + signum)


def explain(verb: str, error: Exception) -> str:
    """Return, in one line, what went wrong and what can be done about it."""
    text = str(error).strip()
    if isinstance(error, (TrainError, OSError)):
        return text
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "allocate memory" in text:
        return OUT_OF_MEMORY[verb]
    first = text.splitlines()[0] if text else "no message"
    return f"{kind}: {first} (--traceback shows where)"


def fail(verb: str, message: str) -> int:
    tell(verb, "error", message)
    return 1


def tell(verb: str, what: str, message: str) -> None:
    say(f"{f'shtx {verb}'.strip()}: {what}: {message}")


def say(text: str) -> None:
    """A line on stderr, where there is anybody left to read it."""
    with suppress(OSError):
        print(" ".join(visible(text).split("\n")), file=sys.stderr, flush=True)
