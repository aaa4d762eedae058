"""Shows what the runs of the study found, as tables and a plot."""

import json
from collections.abc import Iterable
from itertools import groupby, pairwise, product
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.report import BEGIN, END, aligned, splice, write
from benchmarks.studies.quality.runs import LOSSES, SHAPES, Run

COLORS = dict(zip(SHAPES["25M"], ("gray", "blue", "green", "orange", "red"), strict=True))
CONSTANT = 0.8  # share of the steps before the learning rate falls, by --schedule wsd


def run_of(row: dict) -> Run:
    return Run(*(row[field] for field in Run._fields))


def joined(folders: Iterable[Path]) -> list[dict]:
    """The rows in these directories; of a run that is in several, that of the last.

    Raises:
        SystemExit: there is none.
    """
    rows = {}
    for folder in folders:
        whole = folder / "results.json"
        files = [whole] * whole.exists() + sorted(folder.glob("*-seed_*.json"))
        found = [json.loads(file.read_text()) for file in files]
        for row in (row for part in found for row in (part if isinstance(part, list) else [part])):
            rows[run_of(row)] = row
    if not rows:
        raise SystemExit(f"{' '.join(map(str, folders))}: no results there")
    return [rows[run] for run in sorted(rows)]


def flops(row: dict) -> float:
    return row["flop_per_byte"] * row["bytes"]


def at_flops(row: dict, budget: float) -> float:
    """Bits per byte in validation after so many FLOPs, on a line between two validations."""
    points = [(flops(row) * step / row["steps"], bits) for step, _, bits in row["curve"]]
    for (x, left), (y, right) in pairwise(points):
        if x <= budget <= y:
            return left + (right - left) * (budget - x) / (y - x)
    raise ValueError(f"budget must be within {points[0][0]} and {points[-1][0]}, got {budget}")


def equal_flops(rows: list[dict]) -> float:
    """The most FLOPs that all of these had done while their learning rates were still the same."""
    return min(flops(row) for row in rows) * CONSTANT


def spread(values: list[float]) -> str:
    """The mean, and how far the values of several seeds are from it at most."""
    far = max(abs(value - mean(values)) for value in values)
    return f"{mean(values):.4f}" + (f" ± {far:.4f}" if len(values) > 1 else "")


def table(rows: list[dict]) -> str:
    """A line for each model, the seeds of which are together."""
    group = lambda row: (row["corpus"], row["size"])
    lines = []
    for (corpus, size), of_group in groupby(sorted(rows, key=group), group):
        of_group = list(of_group)
        budget = equal_flops(of_group)
        models = {}
        for row in of_group:
            models.setdefault((row["shape"], row["losses"]), []).append(row)
        flat = models.get(("flat", "default"))
        test = lambda found: [row["test_bits_per_byte"] for row in found]
        for shape, losses in product(SHAPES[size], LOSSES):
            if (found := models.get((shape, losses))) is None:
                continue
            over = mean(test(found)) - mean(test(flat)) if flat else None
            lines.append(
                {
                    "corpus": corpus,
                    "size": size,
                    "levels": shape,
                    "losses": losses,
                    "parameters (M)": f"{found[0]['parameters'] / 1e6:.1f}",
                    "seeds": str(len(found)),
                    "bytes seen (M)": f"{mean(row['bytes'] for row in found) / 1e6:,.0f}",
                    "MFLOP a byte": f"{found[0]['flop_per_byte'] / 1e6:.0f}",
                    "test bits a byte, equal time": spread(test(found)),
                    "over flat": "-" if over is None else f"{over:+.4f}",
                    "validation at equal FLOPs": spread([at_flops(row, budget) for row in found]),
                }
            )
    return aligned(lines)


def plot(rows: list[dict], png: Path) -> None:
    """Draw validation over bytes, FLOPs and seconds: a line of panels for each corpus and size."""
    rows = [row for row in rows if row["losses"] == "default" and row["seed"] == 0]
    groups = sorted({(row["corpus"], row["size"]) for row in rows})
    figure = Figure((13, 3.6 * len(groups)), layout="constrained")
    all_axes = figure.subplots(len(groups), 3, squeeze=False)
    for axes, (corpus, size) in zip(all_axes, groups, strict=True):
        for row in rows:
            if (row["corpus"], row["size"]) != (corpus, size):
                continue
            steps, seconds, bits = map(list, zip(*row["curve"][1:], strict=True))
            done = [step / row["steps"] for step in steps]
            for axis, x in zip(
                axes,
                ([d * row["bytes"] for d in done], [d * flops(row) for d in done], seconds),
                strict=True,
            ):
                axis.plot(x, bits, color=f"tab:{COLORS[row['shape']]}", label=row["shape"])
        for axis, label in zip(axes, ("bytes", "FLOPs", "seconds of steps"), strict=True):
            axis.set(xlabel=label, ylabel="validation bits per byte", title=f"{corpus}, {size}")
            axis.grid(alpha=0.3)
        axes[0].legend(title="levels")
    figure.savefig(png, dpi=120)


def save(rows: list[dict], folder: Path) -> None:
    """Write results.json and curves.png, and the table into README.md, between its markers."""
    page = folder / "README.md"
    before = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    text = splice(before, table(rows))
    write(folder / "results.json", json.dumps(rows) + "\n")
    plot(rows, folder / "curves.png")
    write(page, text)
