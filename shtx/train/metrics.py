"""metrics.jsonl, a row a step and a row a validation, and its plot."""

import json
import os
from contextlib import suppress
from pathlib import Path

from shtx.train.files import publish


class Metrics:
    """The rows of a run, to be appended to.

    Args:
        path: the file; rows of steps after `step`, which a resumed run does again, are dropped.
        step: the steps already done; at 0 the run begins, and so does the file.
    """

    def __init__(self, path: Path, step: int):
        rows = [row for row in read(path) if row["step"] <= step] if step and path.exists() else []
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(map(_line, rows)))
        publish(temporary, path)
        self.file = open(path, "a", buffering=1)  # a line at a time

    def append(self, **row) -> None:
        self.file.write(_line(row))

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self.file.fileno())


def read(path: Path) -> list[dict]:
    """The rows, without those that a process did not live to finish."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def plot(path: Path, png: Path) -> None:
    """Draw the rows of `path`: bits per byte over steps, in training and in validation."""
    from matplotlib.figure import Figure

    rows = read(path)
    train = [(row["step"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    val = [(row["step"], row["val_bits_per_byte"]) for row in rows if "val_bits_per_byte" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), linewidth=0.7, alpha=0.7, label="training batch")
    axes.plot(*zip(*val, strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="bits per byte", title="Next-byte loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=150)
