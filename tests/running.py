"""A small run of the command line, and what it leaves."""

import io
import json
from hashlib import sha256

import numpy as np
import torch

from shtx.cli import main
from shtx.train.metrics import read

TINY = (
    "--preset cpu --dim 16 --depth 1 --heads 2 --dim-head 8 --seq-len 32 --window-sizes 8 None"
    " --optimizer adamw --lr 6e-3 --batch-size 4 --steps 12 --log-every 5 --eval-every 6"
    " --save-every 4 --eval-sequences 8"
).split()


def write_text(path):
    """Lines with something to learn in them."""
    numbers = np.random.default_rng(0).integers(0, 1000, 2000)
    path.write_text("".join(f"line {n} is followed by {n + 1}\n" for n in numbers))
    return path


def train(text, out, *arguments):
    return main(["train", *TINY, "--data", str(text), "--out", str(out), *arguments])


def resume(path, *arguments):
    return main(["train", "--resume", str(path), *arguments])


def rows(run):
    """All that depends neither on time nor on the process."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory")}
        for row in read(run / "metrics.jsonl")
    ]


def write(step, name, content):
    """A file of a checkpoint, which its manifest vouches for."""
    (step / name).write_bytes(content)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


def change_config(step, change):
    config = json.loads((step / "config.json").read_text())
    change(config)
    write(step, "config.json", json.dumps(config).encode())


def change_state(step, change):
    state = torch.load(step / "optimizer.pt", weights_only=True)
    change(state)
    file = io.BytesIO()
    torch.save(state, file)
    write(step, "optimizer.pt", file.getvalue())
