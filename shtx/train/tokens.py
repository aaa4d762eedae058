"""Files of token ids: .bin, which is nothing but the ids, and .npy, one array of one dimension."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shtx.train import TrainError

SUFFIXES = (".bin", ".npy")
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Tokens:
    """What a token file holds: ids in [0, num_tokens), each of a little-endian `dtype`."""

    num_tokens: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


def layout(path: Path, tokens: Tokens, flag: str) -> tuple[int, int]:
    """Where in a file its ids begin, and how many bytes they are.

    Raises:
        TrainError: it has another suffix than .bin and .npy, its size is not one of whole ids, or
            its array is not one-dimensional or of another type.
    """
    size, name = os.stat(path).st_size, f"{flag} {path}"
    if path.suffix.lower() == ".bin":
        if size % tokens.itemsize:
            raise TrainError(
                f"{name}: ids of {tokens.dtype} take a multiple of {tokens.itemsize} bytes,"
                f" got {size:,}; --token-dtype names the type"
            )
        return 0, size
    if path.suffix.lower() != ".npy":
        raise TrainError(f"{name}: a file of token ids must end in .bin or .npy")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise TrainError(f"{name}: corrupt .npy file: {error}") from error
    if array.ndim != 1 or array.dtype != np.dtype(tokens.dtype).newbyteorder("<"):
        raise TrainError(
            f"{name}: must be an array of {tokens.dtype} with one dimension,"
            f" got {array.dtype} with {array.ndim}; --token-dtype names the type"
        )
    return array.offset, array.nbytes


def first_beyond(block: bytes, tokens: Tokens) -> tuple[int, int] | None:
    """The first id of a block that the vocabulary does not have: which one, and its value."""
    ids = np.frombuffer(block, tokens.dtype)
    if not len(ids) or int(ids.max()) < tokens.num_tokens:
        return None
    index = int((ids >= tokens.num_tokens).argmax())
    return index, int(ids[index])
