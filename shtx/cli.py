"""The `shtx` command: finds the verb, and imports only what that verb needs."""

import sys
from importlib.util import find_spec

TRAIN_EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "numpy")

HELP = """\
usage: shtx {train,info} [options]

  train   train a byte-level hierarchical transformer, from nothing or from a checkpoint
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
    if verb == "train":
        missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
        if missing:
            return fail("train", f'{", ".join(missing)} not installed: pip install "shtx[train]"')
        return train(rest)
    return fail("", f"unknown verb {verb!r}; the verbs are train and info")


def train(argv: list[str]) -> int:
    from shtx.train import TrainError
    from shtx.train.run import main as train

    try:
        return train(argv)
    except (TrainError, OSError) as error:
        return fail("train", str(error))
    except KeyboardInterrupt:
        print("shtx train: interrupted", file=sys.stderr)
        return 130


def fail(verb: str, message: str) -> int:
    print(f"{f'shtx {verb}'.strip()}: error: {message}", file=sys.stderr)
    return 1
