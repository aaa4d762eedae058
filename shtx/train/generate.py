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
from torch.nn import Module

from shtx.train import TrainError, visible
from shtx.train.config import Config, settings_of
from shtx.train.encode import load_tokenizer, sha256_of
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
    ema: bool = False
    """Take the averaged weights, of a run with --ema."""
    prompt: str | None = None
    """What the text begins with, in UTF-8; for a model of token ids without --tokenizer, some of
    them with spaces between them, and what is shown are token ids, too."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file that has the prompt, in place of --prompt; - is standard input."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH|NAME")] = None
    """The tokenizer of a model of token ids, as `shtx data prepare` takes it."""
    length: int = 512
    """Bytes, or tokens, to sample."""
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
    """Only the fewest of those bytes are taken whose probabilities add up to this; None: all."""
    seed: int | None = None
    """The same one gives the same text; None: another text every time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """cpu, cuda, cuda:1, ..."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of weights and state; None: bf16 on a GPU, fp32 on a CPU."""


def main(argv: list[str]) -> int:
    """Show or write what the arguments ask for; one sample is shown while it is sampled."""
    options = tyro.cli(Options, args=argv, prog="shtx generate", description=DESCRIPTION)
    for name, least in (("length", 0), ("num_samples", 1)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise TrainError(f"--{flag} must be at least {least}, got {getattr(options, name)}")
    if "" in options.stop:
        raise TrainError("--stop must have at least one byte")
    text, files = read_prompt(options), new_files(options)
    device = find_device(options.device, "--device cpu needs none")
    path = Path(os.path.abspath(options.checkpoint))
    model, checkpoint = load_model(path, device, ema=options.ema)
    unit = unit_of(options, settings_of(checkpoint))
    prompt = unit.read("--prompt", text)
    stops = [unit.read("--stop", os.fsencode(stop)) for stop in options.stop]
    samples = [Sample(stops) for _ in range(options.num_samples)]
    chunks = fill(samples, begin(options, model, prompt))
    if len(samples) == 1 and not files:
        unit.show(chain([prompt], chunks))
        return 0
    for _ in chunks:
        pass
    for path, sample in zip(files, samples, strict=False):
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(content := unit.write(prompt + sample.ids))
        publish(temporary, path)
        print(f"{path}: {len(content):,} bytes")
    for number, sample in enumerate(samples if not files else (), 1):
        print(f"[{number}]")
        unit.show([prompt, sample.ids])
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


def unit_of(options: Options, config: Config) -> "Bytes | Tokens | Tokenized":
    if config.tokens is None:
        if options.tokenizer:
            raise TrainError(f"--tokenizer {options.tokenizer}: the run was trained on bytes")
        return Bytes()
    if options.tokenizer is None:
        return Tokens(config.tokens.num_tokens)
    tokenizer = load_tokenizer(options.tokenizer)
    if config.tokenizer not in (None, sha256_of(tokenizer)):
        raise TrainError(
            f"--tokenizer {options.tokenizer}: is not the one that made the tokens of the run"
        )
    return Tokenized(tokenizer)


class Bytes:
    """Reads and writes for a model of bytes: text, as far as it can be shown."""

    def read(self, flag: str, text: bytes) -> list[int]:
        return list(text)

    def write(self, ids: list[int]) -> bytes:
        return bytes(ids)

    def show(self, chunks: Iterable[list[int]]) -> None:
        """Print each character as soon as it is whole."""
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for ids in chunks:
            print(visible(text.decode(bytes(ids))), end="", flush=True)
        print(visible(text.decode(b"", final=True)))


class Tokens:
    """Reads and writes for a model of token ids: the ids, with spaces between them."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def read(self, flag: str, text: bytes) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            ids = []
        if not ids or not all(0 <= id < self.num_tokens for id in ids):
            raise TrainError(
                f"{flag} must be ids in [0, {self.num_tokens:,}) with spaces between them, as the"
                f" run was trained on token ids, got {os.fsdecode(text)!r}"
            )
        return ids

    def write(self, ids: list[int]) -> bytes:
        return " ".join(map(str, ids)).encode() + b"\n"

    def show(self, chunks: Iterable[list[int]]) -> None:
        for number, id in enumerate(chain.from_iterable(chunks)):
            print(" " * (number > 0) + str(id), end="", flush=True)
        print()


class Tokenized:
    """Reads and writes for a model of token ids that has a tokenizer: text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def read(self, flag: str, text: bytes) -> list[int]:
        try:
            ids = self.tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError as error:
            raise TrainError(f"{flag} must be UTF-8 text for a tokenizer: {error}") from error
        if not ids:
            raise TrainError(f"{flag} must have at least one token")
        return ids

    def write(self, ids: list[int]) -> bytes:
        return self.tokenizer.decode(ids, skip_special_tokens=False).encode()

    def show(self, chunks: Iterable[list[int]]) -> None:
        """Print each character as soon as it is whole."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for id in chain.from_iterable(chunks):
            print(visible(stream.step(self.tokenizer, id) or ""), end="", flush=True)
        print()


class Sample:
    """The ids that follow the prompt, up to a text that ends them, which is left out.

    Attributes:
        ids: what was sampled.
        ended: whether such a text came.
    """

    def __init__(self, stops: list[list[int]]):
        self.stops = stops
        self.ids, self.certain, self.ended = [], 0, False

    def add(self, id: int) -> list[int]:
        """Take an id, and return the ids that no stop text can take back any more."""
        if self.ended:
            return []
        self.ids.append(id)
        for stop in self.stops:
            if self.ends_with(stop):
                del self.ids[-len(stop) :]
                self.ended = True
                return self.rest()
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        begun = max((len(start) for start in starts if self.ends_with(start)), default=0)
        return self.rest(len(self.ids) - begun)

    def ends_with(self, text: list[int]) -> bool:
        return self.ids[-len(text) :] == text

    def rest(self, end: int | None = None) -> list[int]:
        """Return what was not returned before, up to `end`."""
        chunk = self.ids[self.certain : end]
        self.certain += len(chunk)
        return chunk


def begin(options: Options, model: Module, prompt: list[int]) -> Iterator[Tensor]:
    """Return the next id of all samples, step by step, each yet to be sampled."""
    dtype = options.dtype or ("bf16" if model.device.type == "cuda" else "fp32")
    try:
        return model.generate(
            torch.tensor([prompt] * options.num_samples, device=model.device),
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


def fill(samples: list[Sample], tokens: Iterator[Tensor]) -> Iterator[list[int]]:
    """Sample until all have ended; yield what becomes certain of the first."""
    for ids in tokens:
        chunks = [s.add(id) for s, id in zip(samples, ids.tolist(), strict=True)]
        yield chunks[0]
        if all(sample.ended for sample in samples):
            return
    yield samples[0].rest()
