"""The `shtx` command: finds the verb, and imports only what that verb needs."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec

TRAIN_EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "numpy")
MODULES = {  # of the verbs that need the extra
    "train": "shtx.train.run",
    "warmup": "shtx.train.warmup",
    "generate": "shtx.train.generate",
}

HELP = """\
usage: shtx {train,warmup,generate,info} [options]

  train      train a byte-level hierarchical transformer, from nothing or from a checkpoint
  warmup     compile ahead what a training with the same options would compile
  generate   text from a checkpoint, as it is sampled
  info       versions, device, which ops run fused; --check compares them with their references

examples:
  shtx train                          this Python's own sources, on whatever device is there
  shtx train --data enwik8.zip --steps 1000
  shtx train --resume runs/enwik8
  shtx generate --checkpoint runs/enwik8 --prompt "The city of" --length 1000
  shtx info --check

`shtx <verb> --help` lists the options of a verb.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments after the program's name; None means those of this process.

    Returns:
        the exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by SIGINT or SIGTERM,
        141 where nobody reads the output any longer, as behind `| head`.
    """
    try:
        status = dispatch(*((sys.argv[1:] if argv is None else argv) or ["--help"]))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 141


def dispatch(verb: str, *rest: str) -> int:
    rest = list(rest)
    if verb in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if verb == "info":
        from shtx.info import main as info

        return info(rest)
    if verb in MODULES:
        missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
        if missing:
            return fail(verb, f'{", ".join(missing)} not installed: pip install "shtx[train]"')
        return run(verb, rest)
    return fail("", f"unknown verb {verb!r}; the verbs are train, warmup, generate and info")


def run(verb: str, argv: list[str]) -> int:
    from shtx.train import TrainError

    try:
        return import_module(MODULES[verb]).main(argv)
    except BrokenPipeError:
        raise
    except (TrainError, OSError) as error:
        return fail(verb, str(error))
    except KeyboardInterrupt:
        print(f"shtx {verb}: interrupted", file=sys.stderr)
        return 130


def fail(verb: str, message: str) -> int:
    print(f"{f'shtx {verb}'.strip()}: error: {message}", file=sys.stderr)
    return 1
