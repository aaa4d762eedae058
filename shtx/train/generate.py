"""`shtx generate`: text from a checkpoint, as it is sampled."""

import codecs
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from shtx.train import TrainError, visible
from shtx.train.run import find_device
from shtx.train.trainer import load_model

DESCRIPTION = """\
Go on with a text, byte by byte, by a model that `shtx train` has trained.

Examples:
  shtx generate --checkpoint runs/enwik8 --prompt "The city of" --length 1000
  shtx generate --checkpoint runs/enwik8/checkpoints/step-020000 --prompt "= " --temperature 0
  shtx generate --checkpoint runs/enwik8 --prompt "The city of" --top-p 0.9 --seed 1 > city.txt
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A run, for its newest checkpoint, or one of its checkpoints."""
    ema: bool = False
    """Take the averaged weights, of a run with --ema."""
    prompt: str
    """What the text begins with, in UTF-8."""
    length: int = 512
    """Bytes to sample."""
    temperature: float = 0.8
    """Of the softmax; 0 takes the most likely byte."""
    top_k: int | None = None
    """How many bytes may be taken, the most likely ones; None: a tenth of all."""
    top_p: float | None = None
    """Of those only the fewest whose probabilities add up to this; None: all."""
    seed: int | None = None
    """The same one gives the same text; None: another text every time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """cpu, cuda, cuda:1, ..."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of weights and state; None: bf16 on a GPU, fp32 on a CPU."""


def main(argv: list[str]) -> int:
    """Print what the arguments ask for, each character as soon as it is whole.

    Returns:
        the exit status, 0.

    Raises:
        TrainError, OSError: in one line what went wrong.
    """
    options = tyro.cli(Options, args=argv, prog="shtx generate", description=DESCRIPTION)
    if not options.prompt:
        raise TrainError("--prompt must have at least one byte")
    if options.length < 0:
        raise TrainError(f"--length must be at least 0, got {options.length}")
    device = find_device(options.device, "--device cpu needs none")
    model, _ = load_model(Path(os.path.abspath(options.checkpoint)), device, ema=options.ema)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    prompt = os.fsencode(options.prompt)
    try:
        tokens = model.generate(
            torch.tensor([list(prompt)], device=device),
            options.length,
            options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=torch.seed() % 2**63 if options.seed is None else options.seed,
            dtype=DTYPES[dtype],
            stream=True,
        )
    except (ValueError, TypeError) as error:
        raise TrainError(str(error)) from error

    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    show = lambda chunk: print(visible(chunk), end="", flush=True)
    show(text.decode(prompt))
    for ids in tokens:
        show(text.decode(bytes(ids.tolist())))
    print(visible(text.decode(b"", final=True)))
    return 0
