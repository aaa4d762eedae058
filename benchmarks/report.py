"""Results as a file, as tables and as charts."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.shapes import CONFIGS, SHARDED

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TITLES = {
    "model": "Train step; floor: its matrix products through cuBLAS, and AdamW",
    "next_latent": "Train step with the loss of next latents; upstream: 0.4.0",
    "scaling": "Train step against the batch, and against the length at as many tokens",
    "gpus": "Train step on several GPUs; weak: a batch each, strong: four batches for all;"
    f" of E {CONFIGS['E'].model['depth']} layers on one GPU, {SHARDED['E']} on several",
    "generate": "Generation, as calls repeat; floor: weights of a token at the speed of a copy",
}
PARTS_TITLE = "What the kernels of the fused train step take"
OP_TITLE = "{}; copy: the row of that name, which moves as many bytes, else the copy above"
PRODUCTS_TITLE = "{}, forward and backward; cublas: its products alone, {}"
SHAPES = {
    "causal_compress": "shape B x N x V x D x D_out x C x stride",
    "chunk_summary": "config",
    "feed_forward": "shape B x M x D",
    "hierarchical_ar_loss": "shape B x M x D",
    "hierarchical_merge": "config",
    "linear": "shape B x M x D",
    "linear_cross_entropy": "shape T x D x V x C",
    "next_latent_loss": "shape B x M x D",
    "norm_token_shift": "shape B x M x D",
    "reconstruction_loss": "shape T x D x V x C",
    "rotary_attention": "shape B x M x H x E",
    "token_embedding": "config",
}
COLORS = {"floor": "tab:gray", "floor-folded": "tab:gray", "fused": "tab:orange"}
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
    """Atomically: a run that is cut leaves the last whole file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def key(row: dict) -> tuple:
    """What was measured."""
    return tuple(row.get(name) for name in ("bench", "config", "shape", "variant", "provider"))


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


def number(value: float | None) -> str:
    """Format a number to three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.{max(0, 3 - len(str(int(value)).lstrip('0')))}f}"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def find(rows: list[dict], row: dict, *providers: str) -> dict:
    """What `row` measures, by the first of `providers` that was measured."""
    for provider in providers:
        for other in rows:
            if key(other) == key(row | {"provider": provider}) and "error" not in other:
                return other
    return {}


def model_line(row: dict, rows: list[dict], results: dict) -> dict:
    floor = find(rows, row, "floor-folded", "floor").get("ms")
    upstream = find(rows, row, "upstream").get("ms")
    first = f"{number(row.get('first_steps_s'))} {row.get('caches', '')}"
    return {
        "config": row["config"],
        "provider": row["provider"],
        "step (ms)": number(row.get("ms")),
        "of the host (ms)": number(row.get("host_ms")),
        "over floor (x)": number(ratio(row.get("ms"), floor)),
        "over TrainStep (x)": number(ratio(row.get("ms"), find(rows, row, "fused").get("ms"))),
        "speed-up over upstream (x)": number(ratio(upstream, row.get("ms"))),
        "throughput (tokens/s)": number(row.get("tokens_per_s")),
        "peak memory (GiB)": number(row.get("peak_gib")),
        "first step (s)": number(row.get("first_step_s")),
        "first two steps (s)": first.strip(),
    }


def next_latent_line(row: dict, rows: list[dict], results: dict) -> dict:
    without = find(rows, row, "fused-without").get("ms")
    upstream = find(rows, row, "upstream").get("ms")
    return {
        "config": row["config"],
        "provider": row["provider"],
        "step (ms)": number(row.get("ms")),
        "over TrainStep without the loss (x)": number(ratio(row.get("ms"), without)),
        "over TrainStep (x)": number(ratio(row.get("ms"), find(rows, row, "fused").get("ms"))),
        "speed-up over upstream (x)": number(ratio(upstream, row.get("ms"))),
        "throughput (tokens/s)": number(row.get("tokens_per_s")),
        "peak memory (GiB)": number(row.get("peak_gib")),
    }


def parts_line(row: dict) -> dict:
    parts = row["parts_ms"]
    return {"config": row["config"], "all kernels (ms)": number(sum(parts.values()))} | {
        f"{part} (ms)": number(ms) for part, ms in parts.items()
    }


def scaling_line(row: dict, rows: list[dict], results: dict) -> dict:
    return {
        "config": row["config"],
        "batch x length": row.get("shape", "-"),
        "provider": row["provider"],
        "step (ms)": number(row.get("ms")),
        "time a token (us)": number(ratio(1e6, row.get("tokens_per_s"))),
        "peak memory (GiB)": number(row.get("peak_gib")),
    }


def share_of_one(row: dict, rows: list[dict]) -> float | None:
    """Throughput over that of as many GPUs as if each were alone; in FLOPs where one GPU has fewer
    layers.
    """
    one = find(rows, row | {"variant": "GPUs: 1"}, row["provider"])
    alone, together = (
        each.get("tokens_per_s") and each["tokens_per_s"] * each.get("flop_per_token", 1)
        for each in (one, row)
    )
    return ratio(together, alone and alone * row.get("gpus", 1))


def gpus_line(row: dict, rows: list[dict], results: dict) -> dict:
    share = share_of_one(row, rows)
    return {
        "config": row["config"],
        "scaling": row.get("shape", "-"),
        "GPUs": str(row.get("gpus", "-")),
        "provider": row["provider"],
        "batch x length": f"{row.get('batch', '-')} x {row.get('seq_len', '-')}",
        "step (ms)": number(row.get("ms")),
        "throughput (tokens/s)": number(row.get("tokens_per_s")),
        "of as many alone (%)": number(share and 100 * share),
        "peak memory of one (GiB)": number(row.get("peak_gib")),
    }


def generate_line(row: dict, rows: list[dict], results: dict) -> dict:
    us, first, state = (row.get(name) for name in ("us_per_token", "first_us", "state_bytes"))
    upstream = find(rows, row, "upstream").get("us_per_token")
    floor = ratio(row.get("weight_bytes"), results["copy_gb_per_s"] * 1e3)
    return {
        "config": row["config"],
        "variant": row.get("variant", "-"),
        "provider": row["provider"],
        "prompt + new": f"{row.get('prompt_tokens', '-')} + {row.get('new_tokens', '-')}",
        "first token (ms)": number(first and first / 1e3),
        "per token (us)": number(us),
        "rate (tokens/s)": number(row.get("tokens_per_s")),
        "of the floor (%)": number(ratio(floor and floor * 100, us)),
        "speed-up over upstream (x)": number(ratio(upstream, us)),
        "state of a sequence (MiB)": number(state and state / 2**20),
    }


def op_line(row: dict, rows: list[dict], results: dict) -> dict:
    def rate(row, direction):
        ms = row.get(f"{direction}_ms")
        return ratio(row.get(f"{direction}_bytes"), ms and ms * 1e6)

    def both_ms(row):
        return row.get("forward_ms", 0) + row.get("backward_ms", 0)

    line = {
        SHAPES.get(row["bench"], "shape"): row.get("shape", "-"),
        "variant": row.get("variant", "-"),
        "provider": row["provider"],
    }
    for direction in ("forward", "backward"):
        ms = row.get(f"{direction}_ms")
        copy = rate(find(rows, row, "copy"), direction) or results["copy_gb_per_s"]
        line |= {
            f"{direction} (us)": number(ms and ms * 1e3),
            f"{direction} (GB/s)": number(rate(row, direction)),
            f"{direction} (% of copy)": number(ratio(rate(row, direction), copy / 100)),
        }
    fused = find(rows, row, "fused")
    return line | {"fwd + bwd over fused (x)": number(ratio(both_ms(row), both_ms(fused)))}


def products_line(row: dict, rows: list[dict], results: dict) -> dict:
    ms, floor = row.get("ms"), find(rows, row, "cublas").get("ms")
    return {
        SHAPES[row["bench"]]: row.get("shape") or row.get("config", "-"),
        "provider": row["provider"],
        "fwd + bwd (us)": number(ms and ms * 1e3),
        "rate (TFLOP/s)": number(ratio(row.get("flops"), ms and ms * 1e9)),
        "of the rate of cublas (%)": number(ratio(floor and floor * 100, ms)),
        "extra memory (MiB)": number(row.get("extra_mib")),
        "over fused (x)": number(ratio(ms, find(rows, row, "fused").get("ms"))),
    }


def compress_line(row: dict, rows: list[dict], results: dict) -> dict:
    ms, second = row.get("ms"), find(rows, row, "cublas").get("second_ms")
    left = number((ms - second) * 1e3 if ms and second else None)
    return products_line(row, rows, results) | {"less cublas's second product (us)": left}


PRODUCTS = {  # what cuBLAS is measured on
    "causal_compress": "of every token, windows side by side in memory",
    "chunk_summary": "of every token",
    "feed_forward": "an inner layer of 4 D",
    "hierarchical_merge": "every level's at its own rate",
    "linear": "to a width of 3 D",
    "linear_cross_entropy": "with all logits in memory",
    "next_latent_loss": "three layers, the first of them 2 D wide",
    "reconstruction_loss": "with all logits in memory",
    "token_embedding": "of every token",
}
LINES = {"model": model_line, "next_latent": next_latent_line, "scaling": scaling_line}
LINES |= {"gpus": gpus_line, "generate": generate_line}
LINES |= dict.fromkeys(PRODUCTS, products_line) | {"causal_compress": compress_line}


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
    ops = sorted({row["bench"] for row in results["rows"]} - TITLES.keys())
    title_of = lambda op: (PRODUCTS_TITLE if op in PRODUCTS else OP_TITLE).format(
        op, PRODUCTS.get(op)
    )
    for bench, heading in (TITLES | {op: title_of(op) for op in ops}).items():
        rows = fastest_first([row for row in results["rows"] if row["bench"] == bench])
        if not rows:
            continue
        line = LINES.get(bench, op_line)
        text += [f"**{heading} ({commits_of(rows)})**"]
        text += [aligned([line(row, rows, results) for row in rows])]
        reasons = [
            " ".join(["-", *filter(None, key(row)[1:])]) + f": {row['error']}"
            for row in rows
            if "error" in row
        ]
        text += ["\n".join(reasons)]
        profiled = [row for row in rows if bench == "model" and "parts_ms" in row]
        if profiled:
            text += [f"**{PARTS_TITLE} ({commits_of(profiled)})**"]
            text += [aligned([parts_line(row) for row in profiled])]
    return "\n\n".join(filter(None, text))


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
    save_bars(results, folder)
    save_scaling(results, folder)
    save_gpus(results, folder)


def panels_of(results: dict, bench: str) -> dict[str, list[dict]]:
    """What was measured, by configuration."""
    rows = [row for row in results["rows"] if row["bench"] == bench and "error" not in row]
    panels = {}
    for row in fastest_first(rows):
        variant = f", {row['variant']}" if "variant" in row else ""
        panels.setdefault(row["config"] + variant, []).append(row)
    return panels


def save_scaling(results: dict, folder: Path):
    """The train step over the batch, or over the length where that varies."""
    panels = panels_of(results, "scaling")
    if not panels:
        return
    figure = Figure((5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False).flat
    for axis, (config, rows) in zip(axes, panels.items(), strict=True):
        by_length = len({row["seq_len"] for row in rows}) > 1
        x = "seq_len" if by_length else "batch"
        for provider in sorted({row["provider"] for row in rows}):
            line = [
                (row[x], 1e6 / row["tokens_per_s"] if by_length else row["ms"])
                for row in sorted(rows, key=lambda row: row[x])
                if row["provider"] == provider
            ]
            color = COLORS.get(provider, "tab:blue")
            axis.plot(*zip(*line, strict=True), marker="o", color=color, label=provider)
        ticks = sorted({row[x] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set(
            title=f"configuration {config}",
            xlabel=f"length, {rows[0]['batch'] * rows[0]['seq_len']:,} tokens a step"
            if by_length
            else f"batch of {rows[0]['seq_len']:,} tokens",
            ylabel="time a token (us)" if by_length else "step (ms)",
            ylim=(0, None),
        )
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{TITLES['scaling']}\n{title(results)}", fontsize="medium", wrap=True)
    figure.savefig(folder / "scaling.png", dpi=120)


def save_gpus(results: dict, folder: Path):
    """Throughput on several GPUs over that on one."""
    measured = [row for rows in panels_of(results, "gpus").values() for row in rows]
    if not measured:
        return
    figure = Figure((5, 4.2), layout="constrained")
    axis = figure.subplots()
    lines = {}
    for row in sorted(measured, key=lambda row: row["gpus"]):
        if share := share_of_one(row, measured):
            line = lines.setdefault(f"{row['config']}, {row['shape']}", [])
            line.append((row["gpus"], row["gpus"] * share))
    for label, line in sorted(lines.items()):
        axis.plot(*zip(*line, strict=True), marker="o", label=label)
    ticks = sorted({row["gpus"] for row in measured})
    axis.plot(ticks, ticks, color="tab:gray", linestyle="--", label="as if each were alone")
    axis.set_xticks(ticks)
    axis.set(xlabel="GPUs", ylabel="throughput over that of one GPU (x)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle(f"{TITLES['gpus']}\n{title(results)}", fontsize="medium", wrap=True)
    figure.savefig(folder / "gpus.png", dpi=120)


def save_bars(results: dict, folder: Path):
    """Train step and generation as bars, a panel for each configuration."""
    for name, field, label in (
        ("model", "ms", "step (ms), lower is better"),
        ("generate", "tokens_per_s", "rate (tokens/s), higher is better"),
    ):
        panels = panels_of(results, name)
        if not panels:
            continue
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        height = 1.0 + 0.32 * max(map(len, panels.values()))
        figure = Figure((6 * columns, 0.8 + lines * height), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, (config, bars) in zip(axes, panels.items(), strict=False):
            providers = [row["provider"] for row in bars]
            colors = [COLORS.get(provider, "tab:blue") for provider in providers]
            drawn = axis.barh(providers, [row[field] for row in bars], color=colors)
            axis.bar_label(drawn, [number(row[field]) for row in bars], padding=3)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set(title=f"configuration {config}", xlabel=label)
        figure.suptitle(f"{TITLES[name]}\n{title(results)}", fontsize="medium", wrap=True)
        figure.savefig(folder / f"{name}.png", dpi=120)
