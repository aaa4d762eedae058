"""`shtx generate`: text or bytes from a checkpoint, as they are sampled."""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from shtx.train import TrainError, visible
from shtx.train.files import publish
from shtx.train.run import find_device
from shtx.train.trainer import load_model

DESCRIPTION = """\
Go on with a text, byte by byte, by a model that `shtx train` has trained.

Examples:
  shtx generate --checkpoint runs/enwik8 --prompt "The city of" --length 1000
  shtx generate --checkpoint runs/enwik8/checkpoints/step-020000 --prompt "= " --temperature 0
  shtx generate --checkpoint runs/enwik8 --prompt-file start.txt --num-samples 4 --stop $'\\n\\n'
  shtx generate --checkpoint runs/songs --prompt-file intro.mid --out song.mid --length 4000
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A run, for its newest checkpoint, or one of its checkpoints."""
    prompt: str | None = None
    """What the text begins with, in UTF-8."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file whose bytes the text begins with, in place of --prompt; - is standard input."""
    length: int = 512
    """Bytes to sample."""
    num_samples: int = 1
    """How many continuations of the prompt to sample, side by side."""
    stop: tuple[str, ...] = ()
    """A sample ends before the first of these texts that it would contain."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the bytes, prompt included, to this new file rather than show them as text. Several
    samples go to FILE-1, FILE-2, ..., before the suffix."""
    temperature: float = 0.8
    """Temperature of the softmax; 0 takes the most likely byte."""
    top_k: int | None = None
    """How many bytes may be taken, the most likely ones; None: a tenth of all."""
    top_p: float | None = None
    """Of those only the fewest whose probabilities add up to this; None: all."""
    seed: int | None = None
    """The same one gives the same text; None: another text every time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """cpu, cuda, cuda:1, ..."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of weights and state; None: bf16 on a GPU, fp32 on a CPU."""


def main(argv: list[str]) -> int:
    """Show or write what the arguments ask for; one sample is shown while it is sampled.

    Returns:
        the exit status, 0.

    Raises:
        TrainError, OSError: in one line what went wrong.
    """
    options = tyro.cli(Options, args=argv, prog="shtx generate", description=DESCRIPTION)
    for name, least in (("length", 0), ("num_samples", 1)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise TrainError(f"--{flag} must be at least {least}, got {getattr(options, name)}")
    if "" in options.stop:
        raise TrainError("--stop must have at least one byte")
    prompt, files = read_prompt(options), new_files(options)
    tokens = begin(options, prompt)
    samples = [Sample(options.stop) for _ in range(options.num_samples)]
    chunks = fill(samples, tokens)
    if len(samples) == 1 and not files:
        show(chain([prompt], chunks))
        return 0
    for _ in chunks:
        pass
    for path, sample in zip(files, samples, strict=False):
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(prompt + sample.content)
        publish(temporary, path)
        print(f"{path}: {len(prompt) + len(sample.content):,} bytes")
    for number, sample in enumerate(samples if not files else (), 1):
        print(f"[{number}]")
        show([prompt, sample.content])
    return 0


def read_prompt(options: Options) -> bytes:
    if (options.prompt is None) == (options.prompt_file is None):
        raise TrainError("either --prompt or --prompt-file must say how the text begins")
    if options.prompt_file is None:
        prompt, name = os.fsencode(options.prompt), "--prompt"
    elif str(options.prompt_file) == "-":
        prompt, name = sys.stdin.buffer.read(), "--prompt-file -"
    else:
        prompt, name = options.prompt_file.read_bytes(), f"--prompt-file {options.prompt_file}"
    if not prompt:
        raise TrainError(f"{name} must have at least one byte")
    return prompt


def new_files(options: Options) -> list[Path]:
    """The file of each sample; none where they are shown."""
    out, count = options.out, options.num_samples
    if out is None:
        return []
    if out.is_dir() or not out.parent.is_dir():
        raise TrainError(f"--out {out}: must name a new file in a directory that is there")
    paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, count + 1)]
    paths = paths if count > 1 else [out]
    for path in filter(Path.exists, paths):
        raise TrainError(f"--out {path}: is there already")
    return paths


class Sample:
    """The bytes that follow the prompt, up to a text that ends them, which is left out.

    Attributes:
        content: what was sampled.
        ended: whether such a text came.
    """

    def __init__(self, stops: Iterable[str]):
        self.stops = [os.fsencode(stop) for stop in stops]
        self.content, self.certain, self.ended = bytearray(), 0, False

    def add(self, byte: int) -> bytes:
        """Take a byte, and return the bytes that no stop text can take back any more."""
        if self.ended:
            return b""
        self.content.append(byte)
        for stop in self.stops:
            if self.content.endswith(stop):
                del self.content[-len(stop) :]
                self.ended = True
                return self.rest()
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        begun = max((len(s) for s in starts if self.content.endswith(s)), default=0)
        return self.rest(len(self.content) - begun)

    def rest(self, end: int | None = None) -> bytes:
        """Return what was not returned before, up to `end`."""
        end = len(self.content) if end is None else end
        chunk = bytes(self.content[self.certain : end])
        self.certain = max(self.certain, end)
        return chunk


def begin(options: Options, prompt: bytes) -> Iterator[Tensor]:
    """Load the model; return the bytes of all samples, a step at a time, yet to be sampled."""
    device = find_device(options.device, "--device cpu needs none")
    model, _ = load_model(Path(os.path.abspath(options.checkpoint)), device)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    try:
        return model.generate(
            torch.tensor([list(prompt)] * options.num_samples, device=device),
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


def fill(samples: list[Sample], tokens: Iterator[Tensor]) -> Iterator[bytes]:
    """Sample until all have ended; yield what becomes certain of the first."""
    for ids in tokens:
        chunks = [s.add(byte) for s, byte in zip(samples, ids.tolist(), strict=True)]
        yield chunks[0]
        if all(sample.ended for sample in samples):
            return
    yield samples[0].rest()


def show(chunks: Iterable[bytes]) -> None:
    """Print bytes as text, each character as soon as it is whole."""
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        print(visible(text.decode(chunk)), end="", flush=True)
    print(visible(text.decode(b"", final=True)))
