"""`shtx eval`: how many bits a checkpoint's model takes for each byte of a file."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from shtx import __version__
from shtx.model import Trunk
from shtx.train import TrainError, files, visible
from shtx.train.data import Corpus, Part, prepare
from shtx.train.metrics import save_figure
from shtx.train.progress import Display
from shtx.train.run import find_device
from shtx.train.trainer import load_model, refuse_untrainable

DESCRIPTION = """\
Score a file by a model that `shtx train` has trained: bits per byte, over every byte of it once.

The model sees --context bytes at a time, and goes on by --stride: each byte but those of the first
window has at least context - stride bytes before it. A smaller stride takes longer, and tells more
of what the model knows. The first byte of all has nothing before it, and counts 8 bits.

Examples:
  shtx eval --checkpoint runs/enwik8 --data test.txt
  shtx eval --checkpoint runs/enwik8 --data enwik8.zip --part validation --stride 64
  shtx eval --checkpoint runs/enwik8 --data test.txt --context 2048 --stride 512 --out test.json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A run, for its newest checkpoint, or one of its checkpoints."""
    ema: bool = False
    """Take the averaged weights, of a run with --ema."""
    data: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A raw file, or a .gz, .bz2, .xz or .zip, as `shtx train` takes it."""
    raw: bool = False
    """Score the bytes of --data as they are, whatever they are."""
    part: Literal["all", "training", "validation"] = "all"
    """Of --data; the last tenth is what `shtx train` holds out for validation."""
    context: int | None = None
    """Bytes that the model sees at once; None: the seq_len that it was trained with, the most."""
    stride: int | None = None
    """By how many bytes it goes on; None: a fourth of the context."""
    batch_size: int = 16
    """Windows at a time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """cpu, cuda, cuda:1, ..."""
    precision: Literal["fp32", "bf16-mixed"] | None = None
    """None: bf16-mixed on a GPU, fp32 on a CPU."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A new file for the figures, with a plot beside it; None: they are printed, no more."""


class Score(NamedTuple):
    """
    Attributes:
        bits: of all bytes together.
        by_position: (context,), the mean of the bits that bytes took with 1, 2, ... bytes before
            them within their windows, which overlap.
    """

    bits: float
    by_position: np.ndarray


def window_starts(count: int, context: int, stride: int) -> list[int]:
    """Where windows of `context` + 1 of `count` bytes begin; the last one ends where they do."""
    last = max(0, count - 1 - context)
    return [*range(0, last, stride), last]


@torch.no_grad()
def score(
    model: Trunk,
    data: Part | np.ndarray,
    context: int,
    stride: int,
    *,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, float], None] = lambda done, bits: None,
) -> Score:
    """Bits that a model of bytes takes for each of `data`, every one once.

    Args:
        model: predicts every byte; it is in eval mode while this runs.
        data: at least 2 bytes.
        context: bytes that a prediction may see; 1 to the model's seq_len.
        stride: by how many bytes windows go on; 1 to context.
        batch_size: windows at a time.
        dtype: of autocast; None: without.
        progress: is told how many bytes have been scored, and their bits.

    Returns:
        the score, whose sums are in fp64.

    Raises:
        ValueError: naming the argument that is not as above.
    """
    if len(data) < 2:
        raise ValueError(f"data must have at least 2 bytes, got {len(data)}")
    for name, value, most in (("context", context, model.seq_len), ("stride", stride, context)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    starts = window_starts(len(data), context, stride)
    context = min(context, len(data) - 1)
    new = [context, *(b - a for a, b in pairwise(starts))]  # bytes that no window before has scored
    bits, by_position = 8.0, torch.zeros(context, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(starts), batch_size):
            windows = np.stack([data[s : s + context + 1] for s in starts[i : i + batch_size]])
            ids = torch.from_numpy(windows).to(model.device).long()
            with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
                logits = model(ids[:, :-1])
            nats = F.cross_entropy(logits.mT.float(), ids[:, 1:], reduction="none").double().cpu()
            by_position += nats.sum(0) / math.log(2)
            for row, count in zip(nats, new[i : i + batch_size], strict=True):
                bits += float(row[context - count :].sum()) / math.log(2)
            progress(1 + sum(new[: i + len(ids)]), bits)
    finally:
        model.train(was_training)
    return Score(bits, (by_position / len(starts)).numpy())


def main(argv: list[str]) -> int:
    """Print, and write, what the arguments ask for.

    Returns:
        the exit status, 0.

    Raises:
        TrainError, OSError: in one line what went wrong.
    """
    options = tyro.cli(Options, args=argv, prog="shtx eval", description=DESCRIPTION)
    if options.out is not None:
        if options.out.suffix != ".json":
            raise TrainError(f"--out {options.out}: must end in .json")
        for path in (options.out, options.out.with_suffix(".png")):
            if path.exists():
                raise TrainError(f"--out {path}: is there already")
    device = find_device(options.device, "--device cpu needs none")
    model, checkpoint = load_model(
        Path(os.path.abspath(options.checkpoint)), device, ema=options.ema
    )
    refuse_untrainable(model)
    context = model.seq_len if options.context is None else options.context
    stride = max(1, context // 4) if options.stride is None else options.stride
    precision = options.precision or ("bf16-mixed" if device.type == "cuda" else "fp32")
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(options.data, Path(folder), 0, raw=options.raw)
        data = part_of(corpus, options.part)
        display = Display(len(data), 0, quiet=False, unit="byte")
        began = last = time.monotonic()

        def progress(done: int, bits: float) -> None:
            nonlocal last
            if (now := time.monotonic()) - last > 1 or not display.bar.disable:
                last = now
                rate = f"{done / (now - began):,.0f} bytes/s"
                display.show(done, f"{bits / done:.4f} bits per byte, {rate}")

        try:
            with display:
                bits, by_position = score(
                    model,
                    data,
                    context,
                    stride,
                    batch_size=options.batch_size,
                    dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
                    progress=progress,
                )
        except ValueError as error:
            raise TrainError(str(error)) from error
        corpus.check()
    seconds = time.monotonic() - began
    figures = {
        "bits_per_byte": bits / len(data),
        "bytes": len(data),
        "bits": bits,
        "part": options.part,
        "data": {"path": str(options.data), **corpus.identity},
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "context": context,
        "stride": stride,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": seconds,
        "versions": {"shtx": __version__, "torch": torch.__version__},
        "bits_by_position": by_position.tolist(),
    }
    if options.out is not None:
        write(options.out, figures)
    print(
        visible(
            f"{checkpoint.path}: {bits / len(data):.4f} bits per byte over {len(data):,} bytes"
            f" (context {context}, stride {stride}, {precision}) in {seconds:.1f} s"
        )
    )
    return 0


def part_of(corpus: Corpus, name: str) -> Part:
    if name == "all":
        return Part(corpus, 0, corpus.val.stop)
    return corpus.train if name == "training" else corpus.val


def write(path: Path, figures: dict) -> None:
    """The figures as JSON, and beside them a plot of the bits by how much context there was."""
    from matplotlib.figure import Figure

    files.make(path.absolute().parent)
    bits = figures["bits_by_position"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(bits) + 1), bits, linewidth=0.8)
    axes.axhline(figures["bits_per_byte"], linestyle="--", linewidth=0.8, color="black")
    axes.set(xscale="log", xlabel="bytes before it in its window", ylabel="bits per byte")
    axes.set(title=f"{figures['bits_per_byte']:.4f} bits per byte over {figures['bytes']:,} bytes")
    axes.grid(alpha=0.3)
    save_figure(figure, path.with_suffix(".png"))
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    files.publish(temporary, path)
