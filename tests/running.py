"""A small run of the command line, and what it leaves."""

import numpy as np

from shtx.cli import main
from shtx.train.metrics import read

TINY = (
    "--preset cpu --dim 16 --depth 1 --heads 2 --dim-head 8 --seq-len 32 --window-sizes 8 None"
    " --batch-size 4 --steps 12 --log-every 5 --eval-every 6 --save-every 4 --eval-sequences 8"
).split()


def write_text(path):
    """Lines with something to learn in them."""
    numbers = np.random.default_rng(0).integers(0, 1000, 2000)
    path.write_text("".join(f"line {n} is followed by {n + 1}\n" for n in numbers))
    return path


def train(text, out, *arguments):
    return main(["train", *TINY, "--data", str(text), "--out", str(out), *arguments])


def resume(path, *arguments):
    return main(["train", "--resume", str(path), *arguments])


def rows(run):
    """All that does not depend on time."""
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"}
        for row in read(run / "metrics.jsonl")
    ]
