"""`shtx eval`: how many bits a checkpoint's model takes for each byte of a file."""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from shtx import __version__
from shtx.model import Trunk
from shtx.train import TrainError, files, visible
from shtx.train.checkpoint import Checkpoint
from shtx.train.config import Config, settings_of
from shtx.train.data import Corpus, prepare, reopen
from shtx.train.home import origin
from shtx.train.metrics import BYTE, Unit, save_figure
from shtx.train.progress import Display
from shtx.train.run import find_device
from shtx.train.score import score
from shtx.train.store import Part
from shtx.train.stream import score_stream
from shtx.train.tokens import description_of
from shtx.train.trainer import load_model, refuse_untrainable

DESCRIPTION = """\
Score a file by a model that `shtx train` has trained: bits per byte, over every byte of it once.

The model sees --context bytes at a time, and goes on by --stride: each byte but those of the first
window has at least context - stride bytes before it. A smaller stride takes longer, and tells more
of what the model knows. The first byte of all has nothing before it, and counts 8 bits. For a
model of token ids the same holds of tokens.

Examples:
  shtx eval --checkpoint runs/enwik8 --data test.txt
  shtx eval --checkpoint runs/enwik8 --split test
  shtx eval --checkpoint runs/enwik8 --data enwik8.zip --part validation --stride 64
  shtx eval --checkpoint runs/windows --split val --stream --batch-size 64
  shtx eval --checkpoint runs/enwik8 --data test.txt --context 2048 --stride 512 --out test.json
"""
SPACE = b" \t\n\r\f\v"


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A run, for its newest checkpoint, or one of its checkpoints."""
    ema: bool = False
    """Take the averaged weights, of a run with --ema."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")] = ()
    """Files, directories or patterns, plain or packed, as `shtx train` takes them; the --separator
    of the run comes between them."""
    split: Literal["train", "val", "test"] | None = None
    """In place of --data, what the run trained on, validated on, or has never looked at."""
    raw: bool = False
    """Score the bytes of --data as they are, whatever they are."""
    part: Literal["all", "training", "validation"] = "all"
    """Which part of --data; the last tenth is what `shtx train` holds out for validation."""
    context: int | None = None
    """Bytes, or tokens, that the model sees at once; None: the seq_len that it was trained with,
    the most."""
    stride: int | None = None
    """How many bytes a window is ahead of the one before; None: a fourth of the context."""
    stream: bool = False
    """In place of windows: every prediction sees all that the model's own windows reach, in
    --batch-size pieces side by side. Takes a model with a window for every level."""
    per_position: bool = False
    """Tell the bits by how many bytes a prediction sees, too: 1, 2, 4, ... of them."""
    words: bool = False
    """Tell the bits per word, too: of what white space divides. Two to this power is the
    perplexity of words."""
    batch_size: int = 16
    """Windows at a time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """cpu, cuda, cuda:1, ..."""
    precision: Literal["fp32", "bf16-mixed"] | None = None
    """None: bf16-mixed on a GPU, fp32 on a CPU."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A new file for the figures, with a plot beside it of the bits by how many bytes a prediction
    sees; None: they are printed, no more."""


def main(argv: list[str]) -> int:
    """Print, and write, what the arguments ask for."""
    options = tyro.cli(Options, args=argv, prog="shtx eval", description=DESCRIPTION)
    check(options)
    device = find_device(options.device, "--device cpu needs none")
    options = replace(options, checkpoint=Path(os.path.abspath(options.checkpoint)))
    model, checkpoint = load_model(options.checkpoint, device, ema=options.ema)
    refuse_untrainable(model)
    options = with_defaults(options, model)
    config = settings_of(checkpoint)
    unit = unit_of(options, config)
    with tempfile.TemporaryDirectory() as folder:
        corpus, data = data_of(options, config, checkpoint, Path(folder))
        began = time.monotonic()
        bits, by_position = bits_of(options, model, data, unit)
        words = count_words(data) if options.words else None
        corpus.check()
    figures = {
        **unit.figures(bits / len(data)),
        f"{unit.name}s": len(data),
        "bits": bits,
        **({"words": words, "bits_per_word": bits / words} if words else {}),
        "part": options.split or options.part,
        "data": {"path": " ".join(map(str, corpus.store.paths)), **corpus.identity},
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        **windows_of(options),
        "precision": options.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": time.monotonic() - began,
        "versions": {"shtx": __version__, "torch": torch.__version__},
        **({} if by_position is None else {"bits_by_position": by_position.tolist()}),
    }
    if options.out is not None:
        write(options.out, figures, unit)
    tell(options, figures, unit)
    return 0


def check(options: Options) -> None:
    """Raise a TrainError for options that do not go together."""
    if options.out is not None:
        if options.out.suffix != ".json":
            raise TrainError(f"--out {options.out}: must end in .json")
        for path in (options.out, options.out.with_suffix(".png")):
            if path.exists():
                raise TrainError(f"--out {path}: is there already")
    if bool(options.data) == (options.split is not None):
        given = "both" if options.data else "neither"
        raise TrainError(f"either --data FILE or --split tells what to score, got {given}")
    if options.split and (options.raw or options.part != "all"):
        flag = "--raw" if options.raw else f"--part {options.part}"
        raise TrainError(f"{flag} is of --data, and --split {options.split} takes its place")
    if options.stream and (options.context, options.stride) != (None, None):
        raise TrainError("--context and --stride are of windows, and --stream takes their place")
    if options.stream and options.per_position:
        raise TrainError("--per-position is of windows, and --stream takes their place")


def with_defaults(options: Options, model: Trunk) -> Options:
    """Put values in place of None, where they depend on the model."""
    context = model.seq_len if options.context is None else options.context
    stride = max(1, context // 4) if options.stride is None else options.stride
    precision = options.precision or ("bf16-mixed" if model.device.type == "cuda" else "fp32")
    return replace(options, context=context, stride=stride, precision=precision)


def data_of(
    options: Options, config: Config, checkpoint: Checkpoint, folder: Path
) -> tuple[Corpus, Part]:
    """Open the data that is scored: a corpus, and the part of it."""
    if options.split is None:
        source = replace(config.source, data=options.data, raw=options.raw)
        corpus = prepare(replace(source, val=(), test=(), split=None), folder, 0)
        return corpus, part_of(corpus, options.part)
    home = origin(options.checkpoint, checkpoint)
    corpus = reopen(config.source, home, checkpoint.config["data"], folder)
    return corpus, split_of(corpus, options.split)


def bits_of(
    options: Options, model: Trunk, data: Part, unit: Unit
) -> tuple[float, np.ndarray | None]:
    """Score the data, and show how far that is.

    Returns:
        the bits of all of it, and the mean bits by position in a window; None for a stream.
    """
    display = Display(len(data), 0, quiet=False, unit=unit.name)
    began = last = time.monotonic()

    def progress(done: int, bits: float) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > 1 or not display.bar.disable:
            last = now
            rate = f"{done / (now - began):,.0f} {unit.name}s/s"
            display.show(done, f"{unit.text(bits / done, 4)}, {rate}")

    dtype = torch.bfloat16 if options.precision == "bf16-mixed" else None
    told = dict(dtype=dtype, progress=progress)
    try:
        with display:
            if options.stream:
                return score_stream(model, data, lanes=options.batch_size, **told), None
            sizes = dict(context=options.context, stride=options.stride)
            return score(model, data, **sizes, batch_size=options.batch_size, **told)
    except ValueError as error:
        raise TrainError(str(error)) from error


def windows_of(options: Options) -> dict[str, int | bool]:
    """The windows that were scored, as figures."""
    if options.stream:
        return {"stream": True}
    return {"context": options.context, "stride": options.stride}


def tell(options: Options, figures: dict, unit: Unit) -> None:
    """Print the figures."""
    told = unit.text(figures[f"bits_per_{unit.name}"], 4)
    if "words" in figures:
        told += f", {figures['bits_per_word']:.4f} bits per word"
    windows = f"context {options.context}, stride {options.stride}"
    how = "as a stream" if options.stream else windows
    print(
        visible(
            f"{figures['checkpoint']}: {told} over {figures[f'{unit.name}s']:,} {unit.name}s"
            f" ({how}, {options.precision}) in {figures['seconds']:.1f} s"
        )
    )
    if options.per_position:
        bits = figures["bits_by_position"]
        for seen in sorted({*(2**i for i in range(len(bits).bit_length())), len(bits)}):
            units = unit.name if seen == 1 else f"{unit.name}s"
            print(f"{seen:,} {units} before: {unit.text(bits[seen - 1], 4)}")


def unit_of(options: Options, config: Config) -> Unit:
    """Return the unit that is scored. The run or the file beside --data tells a token's bytes."""
    if config.tokens is None:
        return BYTE
    if options.words:
        raise TrainError("--words is for bytes, and the run was trained on token ids")
    if options.split:
        return config.unit
    found = description_of(options.data, "--data")
    if found and found.tokens != config.tokens:
        raise TrainError(
            f"--data has {found.tokens.num_tokens:,} token ids of {found.tokens.dtype}, the run"
            f" {config.tokens.num_tokens:,} of {config.tokens.dtype}"
        )
    return Unit("token", found and found.bytes / found.count)


def count_words(data: Part) -> int:
    """Count the stretches without ASCII white space."""
    count, in_word = 0, False
    for start in range(0, len(data), files.BLOCK):
        is_word = ~np.isin(data[start : start + files.BLOCK], np.frombuffer(SPACE, np.uint8))
        before = np.concatenate(([in_word], is_word[:-1]))
        count, in_word = count + int((is_word & ~before).sum()), bool(is_word[-1])
    return count


def part_of(corpus: Corpus, name: str) -> Part:
    if name == "all":
        return Part(corpus.store, 0, len(corpus.store))
    return corpus.train if name == "training" else corpus.val


def split_of(corpus: Corpus, name: str) -> Part:
    if (part := getattr(corpus, name)) is None:
        raise TrainError(
            "--split test: the run has set no test data aside: its --split has two shares, and it"
            " has no --test-data"
        )
    return part


def write(path: Path, figures: dict, unit: Unit) -> None:
    """The figures as JSON."""
    files.make(path.absolute().parent)
    if "bits_by_position" in figures:
        plot(path.with_suffix(".png"), figures, unit)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    files.publish(temporary, path)


def plot(png: Path, figures: dict, unit: Unit) -> None:
    """Draw the bits by how much context there was."""
    from matplotlib.figure import Figure

    bits = figures["bits_by_position"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(bits) + 1), bits, linewidth=0.8)
    mean = figures[f"bits_per_{unit.name}"]
    axes.axhline(mean, linestyle="--", linewidth=0.8, color="black")
    axes.set(xscale="log", xlabel=f"{unit.name}s before it in its window")
    axes.set(ylabel=f"bits per {unit.name}")
    axes.set(title=f"{unit.text(mean, 4)} over {figures[f'{unit.name}s']:,} {unit.name}s")
    axes.grid(alpha=0.3)
    save_figure(figure, png)
