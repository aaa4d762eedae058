"""Files of token ids: .bin, which is nothing but the ids, and .npy, one array of one dimension."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from shtx.train import TrainError, files
from shtx.train.sources import NoSuchFile, expand

SUFFIXES = (".bin", ".npy")
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Tokens:
    """The content of a token file: ids in [0, num_tokens), each of a little-endian `dtype`."""

    num_tokens: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Description:
    """The description of token ids that `shtx data prepare` writes beside them as a JSON file.

    Attributes:
        tokens: vocabulary and type.
        count: how many ids there are.
        bytes: of the text that they stand for.
        tokenizer: sha256 of the tokenizer that made them of it.
    """

    tokens: Tokens
    count: int
    bytes: int
    tokenizer: str

    def write(self, path: Path) -> None:
        """Write it beside the token file `path`."""
        values = asdict(self.tokens) | {
            "tokens": self.count,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes / self.count,
            "tokenizer_sha256": self.tokenizer,
        }
        temporary = beside(path).with_name(f"{beside(path).name}.tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        files.publish(temporary, beside(path))

    @classmethod
    def read(cls, path: Path) -> "Description | None":
        """Read that of the token file `path`; None if there is nothing beside it."""
        try:
            values = files.read_json(beside(path))
        except FileNotFoundError:
            return None
        kinds = dict(num_tokens=int, dtype=str, tokens=int, bytes=int, tokenizer_sha256=str)
        whole = all(type(values.get(name)) is kind for name, kind in kinds.items())
        if not whole or values["dtype"] not in DTYPES or values["tokens"] < 1:
            raise TrainError(f"{beside(path)}: damaged: not what `shtx data prepare` wrote")
        tokens = Tokens(values["num_tokens"], values["dtype"])
        return cls(tokens, *(values[name] for name in ("tokens", "bytes", "tokenizer_sha256")))


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def description_of(given: Sequence[Path], flag: str) -> Description | None:
    """Return the one description of all files that arguments name; None if none has one.

    Raises:
        TrainError: they do not agree, or some have none.
    """
    try:
        paths = [path for path in expand(given, flag, SUFFIXES) if path.suffix.lower() in SUFFIXES]
    except NoSuchFile:
        return None
    found = {path: Description.read(path) for path in paths}
    if not any(found.values()):
        return None
    first, *others = found
    for path in others:
        alike = found[path] and found[first] and (found[path].tokens, found[path].tokenizer)
        if alike != (found[first] and (found[first].tokens, found[first].tokenizer)):
            raise TrainError(f"{flag} {path}: is not of the same tokenizer as {first}")
    return replace(
        found[first],
        count=sum(description.count for description in found.values()),
        bytes=sum(description.bytes for description in found.values()),
    )


def smallest_dtype(num_tokens: int) -> str:
    return "uint16" if num_tokens <= 2**16 else "uint32"


def tokens_of(num_tokens: int | None, dtype: str | None) -> Tokens | None:
    """Return what --num-tokens and --token-dtype tell; None without either."""
    if num_tokens is None:
        if dtype:
            raise TrainError(f"--token-dtype {dtype} takes --num-tokens")
        return None
    most = 2**16 if dtype == "uint16" else 2**32
    if not 1 <= num_tokens <= most:
        raise TrainError(f"--num-tokens must be 1 to {most:,}, got {num_tokens:,}")
    return Tokens(num_tokens, dtype or smallest_dtype(num_tokens))


def layout(path: Path, tokens: Tokens, flag: str) -> tuple[int, int]:
    """Return where in a file its ids begin, and how many bytes they are.

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
