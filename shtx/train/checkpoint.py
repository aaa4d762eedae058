"""Checkpoints: a directory a step, complete or absent, every byte of which is checked on loading.

    RUN/checkpoints/step-000123/model.safetensors   weights
                                optimizer.pt        optimizer and gradient scaler
                                config.json         step, settings of the run, identity of its data
                                manifest.json       size and sha256 of the others

One that sharded processes wrote together has in place of the first two

                                shard-00001-model-00001-of-00001.safetensors, ...   see `shards`

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
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from shtx.train import TrainError, shards
from shtx.train.files import BLOCK, parse_json, publish, read, read_json, sync

FILES = ("model.safetensors", "optimizer.pt", "config.json")
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
KEEP = 2  # unless the run says otherwise
BEST = "best"  # the step of the best validation
TEMPORARY = re.compile(r"\.step-\d+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a directory: `config` is plain JSON, `state` is from the caller of `save`.
    `damaged` are later checkpoints that were passed over, and what is wrong with them.

    `weights` and `state` are None of one that sharded processes wrote, until `whole` reads them."""

    path: Path
    step: int
    config: dict
    weights: dict[str, Tensor] | None
    state: dict | None
    damaged: dict[Path, str] = field(default_factory=dict)


def save(
    run: Path,
    step: int,
    config: dict,
    weights: dict[str, Tensor],
    state: dict,
    keep: int = KEEP,
) -> Path:
    """Write a checkpoint, and remove those of the same run but it, the ones before it that are to
    be kept, and the best one.

    Args:
        run: the directory of the run, which exists.
        step: how many steps were done.
        config: JSON values; "id" is the run's, without it the run has none; "best" has the "step"
            of the best one and its "val_bits", per byte or per token.
        weights: name to tensor, on any device.
        state: dicts, lists, numbers and tensors: whatever torch.load takes with weights_only=True.
        keep: how many, with this one and without the best; at least 1.

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
    with _new(run, step, config, keep) as temporary:
        _write(temporary, contents)
    return path_of(run, step)


def save_shards(
    run: Path | None, step: int, config: dict, tensors: dict[str, Tensor], keep: int = KEEP
) -> None:
    """Save a checkpoint from processes that hold parts of `tensors`: all of them call this.

    Args:
        run: on the first process; None on the others, which need to see the same files.
        step, config, keep: as for `save`, on the first process.
        tensors: as `shards` names them.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    rank, world, error = dist.get_rank(), dist.get_world_size(), None
    with ExitStack() as stack:
        temporary = None
        if run is not None:
            try:
                temporary = stack.enter_context(_new(run, step, config, keep))
            except OSError as raised:
                error = raised
        given = [(temporary, error)]
        dist.broadcast_object_list(given)
        temporary, error = given[0]
        if error is not None:
            raise error
        shards.write(temporary, tensors)
        names = sorted(path.name for path in temporary.glob("*.safetensors"))
        mine = {name: _fingerprint_of(temporary / name) for name in names[rank::world]}
        of_all = [None] * world if rank == 0 else None
        dist.gather_object(mine, of_all)
        if rank == 0:
            content = _json({"step": step, **config})
            manifest = {name: listed for part in of_all for name, listed in part.items()}
            manifest |= {FILES[-1]: _fingerprint(content)}
            _write(temporary, {FILES[-1]: content, MANIFEST: _json(manifest)})


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with all of its weights and state in memory, whoever wrote it.

    Raises:
        TrainError: it is not what was written.
    """
    if checkpoint.weights is not None:
        return checkpoint
    tensors = decode(checkpoint.path, lambda: shards.read(checkpoint.path))
    weights, values, average = shards.nested(tensors)
    groups = checkpoint.config.get("param_groups")
    state = {"optimizer": {"state": values, "param_groups": groups}, "scaler": {}}
    return replace(checkpoint, weights=weights, state=state | ({"ema": average} if average else {}))


def path_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06d}"


def _write(temporary: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (temporary / name).write_bytes(content)
        sync(temporary / name)


@contextmanager
def _new(run: Path, step: int, config: dict, keep: int) -> Iterator[Path]:
    """A directory for the files of a checkpoint, which is one at the end of the context."""
    folder, id = run / CHECKPOINTS, config.get("id")
    if not folder.is_dir():
        folder.mkdir()
        sync(run)
    path = path_of(run, step)
    temporary = _temporary(path)
    try:
        yield temporary
        if _is_of(path, id):  # a later step, which resuming an older one gave up
            _remove(path)
        elif os.path.lexists(path):
            set_aside(path, "kept")
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    best = best_of(config)
    _prune(path, id, keep, best and best[0])


def best_of(config: dict) -> tuple[int, float] | None:
    """The step of the best validation until a checkpoint, and its bits (per byte, or per token);
    None: of none."""
    best = config.get("best")
    if not isinstance(best, dict):
        return None
    step, bits = best.get("step"), best.get("val_bits")
    return (step, bits) if type(step) is int and type(bits) is float else None


def find(path: Path, step: int | str | None = None) -> Path:
    """The directory of a checkpoint.

    Args:
        path: of a run, or of a checkpoint.
        step: which one of a run; "best": that of the best validation; None: the newest, or the
            checkpoint that `path` is.

    Raises:
        TrainError: there is no such one.
    """
    if step is None and step_of(path) is not None:
        return path
    if step_of(path) is not None:
        raise TrainError(f"{path}: is one checkpoint: step must be None, got {step!r}")
    if not (steps := find_steps(path / CHECKPOINTS)):
        raise TrainError(f"{path}: no checkpoint there")
    if step is None:
        return steps[-1]
    if step == BEST:
        best = best_of(peek(steps[-1]).config)
        if best is None:
            raise TrainError(f"{path}: has no best checkpoint: the run had no --keep-best yet")
        step = best[0]
    if type(step) is not int or path_of(path, step) not in steps:
        there = ", ".join(str(step_of(other)) for other in steps)
        raise TrainError(f"{path}: step must be one of {there}, {BEST!r} or None, got {step!r}")
    return path_of(path, step)


def peek(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself, without weights and state, and without a check.

    Raises:
        TrainError: it is damaged, or none.
    """
    step, config = _config(path, _read(path / FILES[-1]))
    return Checkpoint(path=path, step=step, config=config, weights=None, state=None)


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
    if any(map(shards.NAME.fullmatch, manifest)):
        return _load_shards(path, manifest)
    contents = {}
    for name in FILES:
        listed = manifest.get(name)
        size = listed.get("bytes") if isinstance(listed, dict) else None
        contents[name] = _read(path / name, size)
        if listed != _fingerprint(contents[name]):
            raise _unlike(path / name, "sha256" if size == len(contents[name]) else "size")
    weights, optimizer, config = (contents[name] for name in FILES)
    step, config = _config(path, config)
    state = lambda: torch.load(io.BytesIO(optimizer), weights_only=True, map_location="cpu")
    return Checkpoint(
        path=path,
        step=step,
        config=config,
        weights=decode(path / FILES[0], lambda: safetensors.torch.load(weights)),
        state=decode(path / FILES[1], state),
    )


def _load_shards(path: Path, manifest: dict) -> Checkpoint:
    names = sorted(file.name for file in path.iterdir() if shards.NAME.fullmatch(file.name))
    for name in sorted({*names, *manifest, FILES[-1]}):
        file, listed = path / name, manifest.get(name)
        if file.parent != path:
            raise _unlike(path / MANIFEST, "list of files")
        size = listed.get("bytes") if isinstance(listed, dict) else None
        try:
            if not stat.S_ISREG(os.lstat(file).st_mode) or file.stat().st_size != size:
                raise _unlike(file, "size")
            if _fingerprint_of(file) != listed:
                raise _unlike(file, "sha256")
        except FileNotFoundError:
            raise TrainError(f"{file}: missing") from None
    step, config = _config(path, read(path / FILES[-1]))
    return Checkpoint(path=path, step=step, config=config, weights=None, state=None)


def _config(path: Path, content: bytes) -> tuple[int, dict]:
    """The step and the settings in a checkpoint's config.json."""
    config = parse_json(path / FILES[-1], content)
    if type(step := config.pop("step", None)) is not int or step != step_of(path):
        raise TrainError(f"{path / FILES[-1]}: damaged: its step is {step!r}, not that of its name")
    return step, config


def decode(file: Path, read: Callable[[], dict]) -> dict:
    """Call `read`, which decodes a file; raise a TrainError that names the file if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickle protocols have warnings
            value = read()
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise TrainError(f"{file}: refused: it has more in it than tensors and numbers") from error
    except Exception as error:  # decoders raise errors of any kind
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainError(f"{file}: damaged: {what}") from error
    if not isinstance(value, dict):
        raise TrainError(f"{file}: damaged: not what was written")
    return value


def _read(file: Path, size: int | None = None) -> bytes:
    """Read a file, whose size must be `size` if that is given: another may exceed all memory."""
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


def _fingerprint_of(path: Path) -> dict:
    """Fingerprint a file that may be larger than all memory."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


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
    """Return whether the run wrote this checkpoint, and nobody has put other files into it."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()} - {*FILES, MANIFEST}
    if not all(map(shards.NAME.fullmatch, names)):
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


def _prune(newest: Path, id: str | None, count: int, best: int | None) -> None:
    for leftover in newest.parent.glob(".step-*.tmp"):
        if TEMPORARY.fullmatch(leftover.name) and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
    ours = [path for path in find_steps(newest.parent) if _is_of(path, id)]
    before = ours[: ours.index(newest) + 1]
    keep = before[-count:] + [path for path in before if step_of(path) == best]
    for path in ours:
        if path not in keep:
            with suppress(OSError):  # what cannot be removed is no reason to end
                _remove(path)
