"""Results as a file, as tables and as charts."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.benchmark import benchmarks
from benchmarks.cells import find, key, number, ratio

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
FIELDS = {"machine", "copy_gb_per_s", "matmul_tflop_per_s", "small_shapes", "date", "rows"}


# files


def read(path: Path) -> dict:
    """Results as `write` leaves them, or a SystemExit of one line."""
    try:
        results = json.loads(path.read_text())
        if not FIELDS <= results.keys():
            raise ValueError
        return results
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise SystemExit(f"{path} does not hold benchmark results") from None


def write(path: Path, text: str):
    """Write results atomically: a run that is cut leaves the last whole file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def add(results: dict, rows: list[dict]):
    """Add rows to results; one that measures the same as an older one takes its place."""
    new = {key(row) for row in rows}
    results["rows"] = [row for row in results["rows"] if key(row) not in new] + rows


def join(older: dict, newer: dict) -> dict:
    """`newer` and what `older` has besides; a SystemExit of one line if of two machines."""
    for field, value in newer["machine"].items():
        if older["machine"].get(field) != value:
            raise SystemExit(
                "results of two machines cannot be joined:"
                f" {field} was {older['machine'].get(field)}, is {value}"
            )
    results = newer | {"rows": older["rows"]}
    add(results, newer["rows"])
    return results


def by_machine(files: Iterable[dict]) -> list[dict]:
    """Results of each machine, joined."""
    joined = {}
    for results in files:
        machine = tuple(results["machine"].items())
        joined[machine] = join(joined[machine], results) if machine in joined else results
    return list(joined.values())


# tables


def fastest_first(rows: list[dict]) -> list[dict]:
    natural = lambda text: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", text)]
    case = lambda row: [natural(str(row.get(name))) for name in ("config", "shape", "variant")]
    times = ("ms", "us_per_token", "forward_ms")
    time = lambda row: min((row[t] for t in times if t in row), default=float("inf"))
    return sorted(rows, key=lambda row: (case(row), time(row)))


def aligned(lines: list[dict]) -> str:
    """A Markdown table that reads as plain text, too, without columns that have nothing."""
    heads = [head for head in lines[0] if any(line[head] != "-" for line in lines)]
    cells = [heads, *([line[head] for head in heads] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    is_number = [head.endswith(")") for head in heads]
    pad = lambda i, cell: cell.rjust(widths[i]) if is_number[i] else cell.ljust(widths[i])
    texts = ["| " + " | ".join(pad(i, cell) for i, cell in enumerate(row)) + " |" for row in cells]
    rule = [("-" * (w - 1) + ":" if n else "-" * w) for w, n in zip(widths, is_number, strict=True)]
    return "\n".join([texts[0], "| " + " | ".join(rule) + " |", *texts[1:]])


def title(results: dict) -> str:
    machine = results["machine"]
    versions = [
        f"{name} {machine[name]}" for name in ("driver", "torch", "triton") if machine[name]
    ]
    small = "SMALL SHAPES ON A CPU, no measure of a GPU: " * results["small_shapes"]
    return small + ", ".join([machine["gpu"] or machine["cpu"], *versions])


def commits_of(rows: list[dict]) -> str:
    return f"commit {', '.join(sorted({row['commit'] for row in rows}))}"


def tables(results: dict) -> str:
    """All results, in Markdown."""
    text = [
        f"{title(results)}; copy {number(results['copy_gb_per_s'])} GB/s,"
        f" matrix product {number(results['matmul_tflop_per_s'])} TFLOP/s ({results['date']})"
    ]
    for bench, rows in measured(results).items():
        for i, table in enumerate(benchmarks()[bench].tables):
            lines = [(row, table.line(row, rows, results)) for row in rows]
            lines = [(row, line) for row, line in lines if line]
            if not lines:
                continue
            text += [f"**{table.title} ({commits_of([row for row, _ in lines])})**"]
            text += [aligned([line for _, line in lines])]
            text += [reasons(rows)] * (i == 0)
    return "\n\n".join(filter(None, text))


def measured(results: dict) -> dict[str, list[dict]]:
    """Rows by benchmark, in the order in which they are shown."""
    rows = {bench: [] for bench in benchmarks()}
    for row in fastest_first(results["rows"]):
        if row["bench"] not in rows:
            raise SystemExit(
                f"benchmarks/bench_{row['bench']}.py does not say how to show its rows"
            )
        rows[row["bench"]].append(row)
    return {bench: found for bench, found in rows.items() if found}


def reasons(rows: list[dict]) -> str:
    """List the rows that have no times, each with the reason."""
    return "\n".join(
        " ".join(["-", *filter(None, key(row)[1:])]) + f": {row['error']}"
        for row in rows
        if "error" in row
    )


def glance(results: dict) -> str:
    """Compare train steps with those of upstream and of the best of plain PyTorch, for README."""
    models = [row for row in results["rows"] if row["bench"] == "model" and "error" not in row]
    lines, ours = [], [row for row in models if row["provider"] == "fused"]
    for row in fastest_first(ours):
        upstream, compiled = (
            find(models, row, provider).get("ms") for provider in ("upstream", "repaired-compiled")
        )
        lines.append(
            {
                "config": row["config"],
                "upstream (ms)": number(upstream),
                "best compiled PyTorch (ms)": number(compiled),
                "shtx (ms)": number(row["ms"]),
                "over upstream (x)": number(ratio(upstream, row["ms"])),
                "over compiled (x)": number(ratio(compiled, row["ms"])),
                "throughput (tokens/s)": number(row["tokens_per_s"]),
            }
        )
    if not ours:
        return title(results)
    return f"{title(results)} ({results['date']}, {commits_of(ours)})\n\n{aligned(lines)}"


def splice(page: str, text: str) -> str:
    """The page with `text` between its markers, or a SystemExit of one line."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the file to write to lacks {BEGIN} or, after it, {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


# charts


def save_charts(results: dict, folder: Path):
    for bench, rows in measured(results).items():
        whole, chart = [row for row in rows if "error" not in row], benchmarks()[bench].chart
        if whole and chart:
            figure, heading = chart(whole), benchmarks()[bench].tables[0].title
            figure.suptitle(f"{heading}\n{title(results)}", fontsize="medium", wrap=True)
            figure.savefig(folder / f"{bench}.png", dpi=120)
