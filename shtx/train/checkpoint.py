"""Checkpoints: a directory a step, complete or absent, every byte of which is checked on loading.

    RUN/checkpoints/step-000123/model.safetensors   weights
                                optimizer.pt        optimizer and gradient scaler
                                config.json         step, settings of the run, identity of its data
                                manifest.json       size and sha256 of the others

A directory is written and synced under a name that ends in .tmp, and renamed when it is whole.
"""

import hashlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from shtx.train import TrainError
from shtx.train.files import publish, sync

FILES = ("model.safetensors", "optimizer.pt", "config.json")
MANIFEST = "manifest.json"
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds: `config` is plain JSON, `state` what the caller of `save` gave."""

    path: Path
    step: int
    config: dict
    weights: dict[str, Tensor]
    state: dict


def save(run: Path, step: int, config: dict, weights: dict[str, Tensor], state: dict) -> Path:
    """Write a checkpoint and remove all but it and the one before it.

    Args:
        run: the directory of the run.
        step: how many steps were done.
        config: JSON values.
        weights: name to tensor, on any device.
        state: dicts, lists, numbers and tensors: whatever torch.load takes with weights_only=True.

    Returns:
        the directory of the checkpoint.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    optimizer = io.BytesIO()
    torch.save(state, optimizer)
    contents = dict(
        zip(
            FILES,
            (
                safetensors.torch.save({name: t.contiguous() for name, t in weights.items()}),
                optimizer.getvalue(),
                _json({"step": step, **config}),
            ),
            strict=True,
        )
    )
    manifest = {name: _fingerprint(content) for name, content in contents.items()}
    contents[MANIFEST] = _json(manifest)

    path = run / "checkpoints" / f"step-{step:06d}"
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
            sync(temporary / name)
        if path.exists():  # of the future that resuming an older step gave up
            _remove(path)
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(path)
    return path


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, of which nothing is used before all of it was checked.

    Args:
        path: the directory of a run, for its newest checkpoint, or that of a checkpoint.

    Raises:
        TrainError: there is none, or a file of it is missing or damaged; it names the file.
    """
    if _step(path) is None:
        if not (steps := _steps(path / "checkpoints")):
            raise TrainError(f"{path}: no checkpoint there")
        path = steps[-1]
    manifest = _parse(path / MANIFEST, _read(path / MANIFEST))
    contents = {name: _read(path / name) for name in FILES}
    for name, content in contents.items():
        if (listed := manifest.get(name)) != _fingerprint(content):
            size = listed.get("bytes") if isinstance(listed, dict) else None
            what = "sha256" if size == len(content) else "size"
            raise _damaged(path / name, f"damaged: its {what} is not that in {MANIFEST}")
    weights, optimizer, config = (contents[name] for name in FILES)
    config = json.loads(config)
    return Checkpoint(
        path=path,
        step=config.pop("step"),
        config=config,
        weights=safetensors.torch.load(weights),
        state=torch.load(io.BytesIO(optimizer), weights_only=True, map_location="cpu"),
    )


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=2).encode()


def _fingerprint(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise _damaged(file, "missing") from None


def _parse(file: Path, content: bytes) -> dict:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _damaged(file, "damaged: not the JSON that was written")
    return value


def _damaged(file: Path, what: str) -> TrainError:
    step = file.parent
    older = [path for path in _steps(step.parent) if _step(path) < _step(step)]
    hint = f"an older step is {older[-1]}" if older else "no older step is left"
    return TrainError(f"{file}: {what}; {hint}")


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def _steps(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(
        (path for path in checkpoints.glob("step-*") if _step(path) is not None), key=_step
    )


def _remove(path: Path) -> None:
    """Delete a checkpoint; half of it never bears a checkpoint's name."""
    doomed = path.with_name(f"{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _prune(newest: Path) -> None:
    steps = _steps(newest.parent)
    keep = steps[: steps.index(newest) + 1][-KEEP:]
    for path in steps:
        if path not in keep:
            _remove(path)
    for leftover in newest.parent.glob("step-*.*"):
        shutil.rmtree(leftover)
