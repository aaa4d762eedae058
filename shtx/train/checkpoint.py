"""Checkpoints: a directory a step, complete or absent, every byte of which is checked on loading.

    RUN/checkpoints/step-000123/model.safetensors   weights
                                optimizer.pt        optimizer and gradient scaler
                                config.json         step, settings of the run, identity of its data
                                manifest.json       size and sha256 of the others

A directory is written and synced under a hidden name, `.step-000123.<8 digits>.tmp`, and renamed
when it is whole. Nothing is deleted but what bears such a name, or is a checkpoint of the same run.
"""

import hashlib
import io
import json
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from shtx.train import TrainError
from shtx.train.files import parse_json, publish, read, read_json, sync

FILES = ("model.safetensors", "optimizer.pt", "config.json")
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
KEEP = 2
TEMPORARY = re.compile(r"\.step-\d+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds: `config` is plain JSON, `state` what the caller of `save` gave.
    `damaged` are later checkpoints that were passed over, and what is wrong with them."""

    path: Path
    step: int
    config: dict
    weights: dict[str, Tensor]
    state: dict
    damaged: dict[Path, str] = field(default_factory=dict)


def save(run: Path, step: int, config: dict, weights: dict[str, Tensor], state: dict) -> Path:
    """Write a checkpoint, and remove those of the same run but it and the one before it.

    Args:
        run: the directory of the run, which exists.
        step: how many steps were done.
        config: JSON values; "id" is the run's, without it the run has none.
        weights: name to tensor, on any device.
        state: dicts, lists, numbers and tensors: whatever torch.load takes with weights_only=True.

    Returns:
        the directory of the checkpoint. What had its name and is not a checkpoint of the run has
        got another name, which ends in .kept.

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

    folder = run / CHECKPOINTS
    if not folder.is_dir():
        folder.mkdir()
        sync(run)
    path = folder / f"step-{step:06d}"
    temporary = _temporary(path)
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
            sync(temporary / name)
        if _is_of(path, config.get("id")):  # of the future that resuming an older step gave up
            _remove(path)
        elif os.path.lexists(path):
            set_aside(path, "kept")
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(path, config.get("id"))
    return path


def load(path: Path, fallback: bool = False) -> Checkpoint:
    """Read a checkpoint, of which nothing is used before all of it was checked.

    Args:
        path: the directory of a run, for its newest checkpoint, or that of a checkpoint.
        fallback: pass over damaged checkpoints, to the newest good one before them.

    Raises:
        TrainError: there is none, or a file of it is missing or damaged; it names the file.
    """
    steps = find_steps(path.parent if step_of(path) is not None else path / CHECKPOINTS)
    if step_of(path) is not None:
        steps = [other for other in steps if step_of(other) < step_of(path)] + [path]
    if not steps:
        raise TrainError(f"{path}: no checkpoint there")
    damaged = {}
    while True:
        newest = steps.pop()
        try:
            return replace(_load(newest), damaged=damaged)
        except TrainError as error:
            damaged[newest] = str(error)
            if not steps or not fallback:
                hint = "no older step is left"
                if steps:
                    hint = (
                        f"an older step is {steps[-1]} (shtx train --resume-fallback goes on there)"
                    )
                raise TrainError(f"{error}; {hint}") from error


def _load(path: Path) -> Checkpoint:
    manifest = parse_json(path / MANIFEST, _read(path / MANIFEST))
    contents = {}
    for name in FILES:
        listed = manifest.get(name)
        size = listed.get("bytes") if isinstance(listed, dict) else None
        contents[name] = _read(path / name, size)
        if listed != _fingerprint(contents[name]):
            raise _unlike(path / name, "sha256" if size == len(contents[name]) else "size")
    weights, optimizer, config = (contents[name] for name in FILES)
    config = parse_json(path / FILES[2], config)
    if type(step := config.pop("step", None)) is not int or step != step_of(path):
        raise TrainError(f"{path / FILES[2]}: damaged: its step is {step!r}, not that of its name")
    state = lambda: torch.load(io.BytesIO(optimizer), weights_only=True, map_location="cpu")
    return Checkpoint(
        path=path,
        step=step,
        config=config,
        weights=decode(path / FILES[0], lambda: safetensors.torch.load(weights)),
        state=decode(path / FILES[1], state),
    )


def decode(file: Path, read: Callable[[], dict]) -> dict:
    """What `read` makes of the content of a file; a TrainError that names the file if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            value = read()
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise TrainError(f"{file}: refused: it has more in it than tensors and numbers") from error
    except Exception as error:  # of whatever kind, from what does the decoding
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainError(f"{file}: damaged: {what}") from error
    if not isinstance(value, dict):
        raise TrainError(f"{file}: damaged: not what was written")
    return value


def _read(file: Path, size: int | None = None) -> bytes:
    """Of `size` bytes if that is given: a file of another size may be larger than all memory."""
    try:
        if size is not None and file.stat().st_size != size:
            raise _unlike(file, "size")
        return read(file)
    except FileNotFoundError:
        raise TrainError(f"{file}: missing") from None


def _unlike(file: Path, what: str) -> TrainError:
    return TrainError(f"{file}: damaged: its {what} is not that in {MANIFEST}")


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=2).encode()


def _fingerprint(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def step_of(path: Path) -> int | None:
    """The step that the name of a checkpoint says; None for any other name."""
    digits = path.name.removeprefix("step-")
    exact = digits.isascii() and digits.isdigit() and path.name == f"step-{int(digits):06d}"
    return int(digits) if exact else None


def find_steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    steps = (path for path in folder.glob("step-*") if step_of(path) is not None)
    return sorted((path for path in steps if path.is_dir()), key=step_of)


def set_aside(path: Path, why: str) -> Path:
    """Give what is not a good checkpoint of the run another name; its bytes stay."""
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        aside = path.with_name(f"{path.name}.{why}{suffix}")
        if not os.path.lexists(aside):
            break
    os.rename(path, aside)
    return aside


def _is_of(path: Path, id: str | None) -> bool:
    """Whether this is a checkpoint that the run wrote, with no file of anybody else in it."""
    if path.is_symlink() or not path.is_dir():
        return False
    if not {file.name for file in path.iterdir()} <= {*FILES, MANIFEST}:
        return False
    try:
        written = read_json(path / FILES[-1])
    except (TrainError, OSError):
        return False
    return written.get("id") == id and written.get("step") == step_of(path)


def _temporary(path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    return temporary


def _remove(path: Path) -> None:
    """Delete a checkpoint; half of it never bears a checkpoint's name."""
    doomed = _temporary(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _prune(newest: Path, id: str | None) -> None:
    for leftover in newest.parent.glob(".step-*.tmp"):
        if TEMPORARY.fullmatch(leftover.name) and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
    ours = [path for path in find_steps(newest.parent) if _is_of(path, id)]
    keep = ours[: ours.index(newest) + 1][-KEEP:]
    for path in ours:
        if path not in keep:
            with suppress(OSError):  # what cannot be removed is no reason to end
                _remove(path)
