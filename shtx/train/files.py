"""Files that a crash leaves whole: either as they were or as they are meant to be."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the file, or the entries of the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or directory its name, which nothing or a file has so far."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
