"""The bytes of several files as one sequence, read where they lie; that of token ids, too."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shtx.train import TrainError
from shtx.train.files import BLOCK
from shtx.train.tokens import Tokens, first_beyond, layout


class DataChanged(TrainError):
    """The bytes are no longer those that the run began with."""


class OpenFile:
    """A part of a file, of the bytes at which it was opened though its name may go to others."""

    def __init__(self, path: Path, start: int, size: int):
        self.path, self.start, self.size = path, start, size
        self.file = open(path, "rb", buffering=0)
        self.stamp = self.stamp_now()

    def stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes, or fewer where the file ends."""
        read = partial(os.pread, self.file.fileno())
        content = read(count, self.start + start)
        while len(content) < count:  # one read returns at most 2 GiB
            if not (more := read(count - len(content), self.start + start + len(content))):
                break
            content += more
        return content


class Piece(NamedTuple):
    """A part of a store, from its byte `start` on: a file, or a separator where `file` is None."""

    start: int
    size: int
    file: OpenFile | None


class Store:
    """The bytes of several files, one after the other, read piece by piece where they lie.

    A pickle has the arguments alone: another process opens the files anew.

    Args:
        paths: the files.
        separator: bytes between two of them.
        tokens: what they hold, if it is token ids; bytes by default.
        flag: what named them, for messages.
        identity: size and sha256 of it all, for a process that need not find them out.

    Raises:
        TrainError: the size is not that of the identity; or for `tokens` a file is not one of
            token ids, or has one that is too large.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        separator: bytes = b"",
        tokens: Tokens | None = None,
        flag: str = "--data",
        identity: dict | None = None,
    ):
        self.paths, self.separator, self.tokens, self.flag = list(paths), separator, tokens, flag
        self.itemsize = tokens.itemsize if tokens else 1
        self.pieces, size = [], 0
        for i, path in enumerate(paths):
            if i and separator:
                self.pieces.append(Piece(size, len(separator), None))
                size += len(separator)
            begin, count = layout(path, tokens, flag) if tokens else (0, os.stat(path).st_size)
            self.pieces.append(Piece(size, count, OpenFile(path, begin, count)))
            size += count
        self.starts = [piece.start for piece in self.pieces]
        if identity and size != identity["bytes"]:
            raise self._changed(self.pieces[0].file)
        self.size = size
        self.identity = identity or self._identify()

    def __reduce__(self):
        return Store, (self.paths, self.separator, self.tokens, self.flag, self.identity)

    def moved(self, path: Path) -> None:
        """The only file has this name by now."""
        self.paths = [path]
        self.pieces[0].file.path = path

    def __len__(self) -> int:
        """Bytes, or token ids."""
        return self.size // self.itemsize

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` bytes as uint8, or token ids as int64; a DataChanged if they are not those of the
        beginning any more."""
        at, stop = start * self.itemsize, (start + count) * self.itemsize
        first = bisect_right(self.starts, at) - 1
        blocks = []
        for piece in self.pieces[first:]:
            if at >= stop:
                break
            if piece.file:
                self._check(piece.file)
            most = min(stop, piece.start + piece.size) - at
            blocks.append(self._read(piece, at - piece.start, most))
            at += most
        content = b"".join(blocks)
        if self.tokens:
            return np.frombuffer(content, self.tokens.dtype).astype(np.int64)
        return np.frombuffer(content, np.uint8)

    def check(self) -> None:
        """Raise a DataChanged if the bytes of any file are not those of the beginning any more."""
        for piece in self.pieces:
            if piece.file:
                self._check(piece.file)

    def blocks(self) -> Iterator[tuple[Piece, int, bytes]]:
        """All bytes, in order: the piece they are of, where in it they begin, and the bytes."""
        for piece in self.pieces:
            for start in range(0, piece.size, BLOCK):
                yield piece, start, self._read(piece, start, min(BLOCK, piece.size - start))

    def _read(self, piece: Piece, start: int, count: int) -> bytes:
        if piece.file is None:
            return self.separator[start : start + count]
        content = piece.file.read(start, count)
        if len(content) < count:
            raise self._changed(piece.file)
        return content

    def _check(self, file: OpenFile) -> None:
        """A file that was touched, or copied over with the same bytes, is as good."""
        if file.stamp != (stamp := file.stamp_now()):
            if stamp[0] != file.stamp[0] or self._identify() != self.identity:
                raise self._changed(file)
            file.stamp = stamp

    def _identify(self) -> dict:
        digest = hashlib.sha256()
        for piece, start, block in self.blocks():
            digest.update(block)
            if self.tokens and (found := first_beyond(block, self.tokens)):
                index, id = found
                raise TrainError(
                    f"{self.flag} {piece.file.path}: token {start // self.itemsize + index:,} has"
                    f" id {id:,}: ids must be in [0, {self.tokens.num_tokens:,}), the vocabulary"
                )
        return {"bytes": self.size, "sha256": digest.hexdigest()}

    def _changed(self, file: OpenFile) -> DataChanged:
        return DataChanged(f"{self.flag} {file.path}: the bytes changed while the run went on")


class Part:
    """Bytes, or token ids, from `start` to `stop` of a store: a slice of it reads them."""

    def __init__(self, store: Store, start: int, stop: int):
        self.store, self.start, self.stop = store, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        return self.store.read(self.start + start, max(0, stop - start))[::step]
