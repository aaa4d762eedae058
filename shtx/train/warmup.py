"""`shtx warmup`: compile ahead what `shtx train` would compile in its first steps."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shtx import ops
from shtx.train.arguments import parse
from shtx.train.config import Config
from shtx.train.data import Corpus
from shtx.train.run import place
from shtx.train.store import Store
from shtx.train.tokens import Tokens
from shtx.train.trainer import Trainer, build, refuse_untrainable

DESCRIPTION = """\
Compile ahead every kernel of a run: takes the options of `shtx train`, and trains on nothing.

Two steps, a validation and a sample of the model on random bytes; what they compile stays in
Triton's cache. No file of the run is read or written, but for a checkpoint that --resume names.

Examples:
  shtx warmup
  shtx warmup --precision bf16-mixed --batch-size 4
  shtx warmup --resume runs/enwik8
"""


def main(argv: list[str]) -> int:
    """Compile for a run as the arguments say."""
    config, _ = parse(argv, prog="shtx warmup", description=DESCRIPTION)
    device, rank, world = place(config)
    model = build(config, device, copies=4, world=world)
    refuse_untrainable(model)
    if reason := nothing_to_compile(model):
        print(f"nothing to compile: {reason}")
        return 0
    trainer = Trainer(config, noise(config), model, rank, world)
    for what, seconds in warm(trainer):
        if rank == 0:
            print(f"{what}: {seconds:.1f} s", flush=True)
    trainer.close()
    return 0


def nothing_to_compile(model) -> str | None:
    """Return the reason why the model needs no compiling; None if it does."""
    if model.device.type == "cpu":
        return "PyTorch on a CPU has all ops as they are"
    if model.ops_for(model.device) is not ops.FUSED:
        return "the reference ops are PyTorch's"
    return None


def noise(config: Config) -> Corpus:
    """Random data, several sequences in each part, of a file that has no name any more."""
    tokens = config.tokens or Tokens(256, "uint8")
    size = 20 * (config.model.seq_len + 1)
    descriptor, name = tempfile.mkstemp(suffix=".bin")
    with os.fdopen(descriptor, "wb") as file:
        ids = np.random.default_rng(0).integers(0, tokens.num_tokens, size)
        file.write(ids.astype(tokens.dtype).tobytes())
    corpus = Corpus(Store([Path(name)], tokens=config.tokens), config.model.seq_len)
    os.unlink(name)
    return corpus


def warm(trainer: Trainer) -> Iterator[tuple[str, float]]:
    """Runs each part of a run once; its name and seconds.

    A step takes two: the second one is captured into a CUDA graph.
    """
    parts = {
        "first step": lambda: trainer.step(0).tolist(),
        "second step": lambda: trainer.step(1).tolist(),
        "validation": trainer.evaluate,
        "sample": trainer.sample,
    }
    for what, run in parts.items():
        start = time.perf_counter()
        run()
        yield what, time.perf_counter() - start
