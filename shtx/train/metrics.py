"""metrics.jsonl, a row a step and a row a validation, and its plot."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shtx.train import files, visible

VALIDATIONS = ("val_bits_per_byte", "val_bits_per_token")


class Unit(NamedTuple):
    """The unit that a model predicts: a "byte", or a "token". `bytes` is how many a token stands
    for in the mean, or None where that is not known.
    """

    name: str
    bytes: float | None

    def figures(self, bits: float, prefix: str = "") -> dict[str, float]:
        """The figures of `bits` per unit, per byte where that is known, by their names in a row."""
        figures = {f"{prefix}bits_per_{self.name}": bits}
        if self.name != "byte" and self.bytes:
            figures[f"{prefix}bits_per_byte"] = bits / self.bytes
        return figures

    def text(self, bits: float, digits: int = 3) -> str:
        """Return these figures as text."""
        figures = self.figures(bits).items()
        return ", ".join(f"{value:.{digits}f} {name.replace('_', ' ')}" for name, value in figures)

    def show(self, ids: list[int]) -> str:
        """Bytes as text, those that are not UTF-8 or would move the cursor as escapes; token ids as
        numbers."""
        if self.name == "byte":
            return visible(bytes(ids).decode("utf-8", errors="backslashreplace"))
        return " ".join(map(str, ids))


BYTE = Unit("byte", 1.0)


class Metrics:
    """The rows of a run, to be appended to.

    Args:
        path: the file; rows of steps after `step`, which a resumed run does again, are dropped, and
            lines that a process did not live to finish. Other lines stay.
        step: the steps already done; at 0 the run begins, and so does the file.
    """

    def __init__(self, path: Path, step: int):
        lines = _lines(path) if step and path.exists() else []
        lines = [(line, row) for line, row in lines if _step(row) is None or _step(row) <= step]
        self.validated = {
            _step(row) for _, row in lines if _is_row(row) and {*VALIDATIONS} & {*row}
        }
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line, _ in lines))
        files.publish(temporary, path)
        self.file = open(path, "a", buffering=1)  # a line at a time

    def append(self, **row) -> None:
        self.file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self.file.fileno())

    def lacks_validation(self, step: int, every: int) -> bool:
        """Return whether a validation was due after this step and has not been made."""
        return step % every == 0 and step not in self.validated


def read(path: Path) -> list[dict]:
    """The rows: objects with a step, all of whose values are numbers."""
    return [row for _, row in _lines(path) if _is_row(row)]


def _lines(path: Path) -> list[tuple[str, object]]:
    lines = []
    for line in files.read(path).decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            lines.append((line, json.loads(line)))
    return lines


def _is_row(row) -> bool:
    return _step(row) is not None and all(type(value) in (int, float) for value in row.values())


def _step(row) -> int | None:
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def plot(path: Path, png: Path) -> None:
    """Draw the rows of `path`: bits per token, or else per byte, over steps, in training and in
    validation."""
    from matplotlib.figure import Figure

    rows = read(path)
    name = "bits_per_token" if any("bits_per_token" in row for row in rows) else "bits_per_byte"
    train, val = (
        [(row["step"], row[key]) for row in rows if key in row] for key in (name, f"val_{name}")
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), linewidth=0.7, alpha=0.7, label="training batch")
    axes.plot(*zip(*val, strict=True), marker="o", label="validation")
    axes.set(
        xlabel="step", ylabel=name.replace("_", " "), title=f"Next-{name[9:]} loss", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, png)


def save_figure(figure, png: Path) -> None:
    """Draw a matplotlib figure into a file, which a crash leaves as it was or whole."""
    temporary = png.with_name(f"{png.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    files.publish(temporary, png)
