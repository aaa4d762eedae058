"""Files that a crash leaves whole: either as they were or as they are meant to be."""

import json
import os
import stat
from pathlib import Path

from shtx.train import TrainError

BLOCK = 1 << 20  # bytes


def sync(path: Path) -> None:
    """Wait until the file, or the entries of the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make(path: Path) -> None:
    """Make a directory and those above it, where they are missing, to stay after a crash."""
    if path.is_dir():
        return
    if not path.parent.exists():
        make(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or directory its name, which nothing or a file has so far."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def read(path: Path) -> bytes:
    """The bytes of a regular file; a TrainError for what is none, as a pipe, which never ends."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise TrainError(f"{path}: damaged: not a regular file")
    return path.read_bytes()


def read_json(path: Path) -> dict:
    """The JSON object in a file; a TrainError that names the file for anything else."""
    return parse_json(path, read(path))


def parse_json(path: Path, content: bytes) -> dict:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise TrainError(f"{path}: damaged: not the JSON that was written")
    return value
