"""The `shtx` command: finds the verb, and imports only what that verb needs."""

import sys
from importlib.util import find_spec

TRAIN_EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "numpy")

HELP = """\
usage: shtx {train,warmup,info} [options]

  train   train a byte-level hierarchical transformer, from nothing or from a checkpoint
  warmup  compile ahead what a training with the same options would compile
  info    versions, device, which ops run fused; --check compares them with their references

examples:
  shtx train                          this Python's own sources, on whatever device is there
  shtx train --data enwik8.zip --steps 1000
  shtx train --resume runs/enwik8
  shtx info --check

`shtx <verb> --help` lists the options of a verb.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments after the program's name; None means those of this process.

    Returns:
        the exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by SIGINT or SIGTERM.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if verb == "info":
        from shtx.info import main as info

        return info(rest)
    if verb in ("train", "warmup"):
        missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
        if missing:
            return fail(verb, f'{", ".join(missing)} not installed: pip install "shtx[train]"')
        return train(verb, rest)
    return fail("", f"unknown verb {verb!r}; the verbs are train, warmup and info")


def train(verb: str, argv: list[str]) -> int:
    from shtx.train import TrainError, run, warmup

    try:
        return (run if verb == "train" else warmup).main(argv)
    except (TrainError, OSError) as error:
        return fail(verb, str(error))
    except KeyboardInterrupt:
        print(f"shtx {verb}: interrupted", file=sys.stderr)
        return 130


def fail(verb: str, message: str) -> int:
    print(f"{f'shtx {verb}'.strip()}: error: {message}", file=sys.stderr)
    return 1
