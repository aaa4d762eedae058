"""Bytes to train on, read where they lie; a batch is a pure function of (seed, step, rank)."""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import re
import struct
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from shtx.train import TrainError
from shtx.train.files import BLOCK, publish

# what is unpacked, by how it begins
PACKED = {
    "gz": b"\x1f\x8b\x08",
    "zip": b"PK\x03\x04",
    "bz2": b"BZh91AY&SY",
    "xz": b"\xfd7zXZ\x00",
}
# what is not: trained on as it is, it would be noise or headers
FOREIGN = {
    "a Zstandard file": b"\x28\xb5\x2f\xfd",
    "an LZ4 file": b"\x04\x22\x4d\x18",
    "a 7z archive": b"7z\xbc\xaf\x27\x1c",
    "a RAR archive": b"Rar!\x1a\x07",
    "a compress file": b"\x1f\x9d",
    "a NumPy array": b"\x93NUMPY",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a Parquet file": b"PAR1",
    "an Arrow file": b"ARROW1",
    "an SQLite database": b"SQLite format 3\x00",
}
HEAD = 512  # bytes that tell what a file is; a tar archive has its mark at 257
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DataChanged(TrainError):
    """The bytes are no longer those that the run began with."""


class Part:
    """Bytes from `start` to `stop` of a corpus: a slice of it reads them."""

    def __init__(self, corpus: "Corpus", start: int, stop: int):
        self.corpus, self.start, self.stop = corpus, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        return self.corpus.read(self.start + start, max(0, stop - start))[::step]


class Corpus:
    """A file of bytes; its last tenth is for validation.

    Args:
        path: the file, which stays where it is and is read piece by piece.
        seq_len: bytes a model sees at once; a sequence has one more, the last target.
        identity: its size and sha256, for a process that need not find them out.

    Raises:
        TrainError: either part is shorter than seq_len + 1 bytes, or the size is not that of the
            identity.
    """

    def __init__(self, path: Path, seq_len: int, identity: dict | None = None):
        self.path, self.seq_len = path, seq_len
        self.file = open(path, "rb", buffering=0)
        self.stamp = self._stamp()
        size = self.stamp[0]
        if identity and size != identity["bytes"]:
            raise self._changed()
        held_out = size // 10
        if held_out < seq_len + 1:  # the other part is longer
            raise TrainError(
                f"--data: {size:,} bytes are too few: the last tenth, for validation, must have"
                f" at least seq_len + 1 = {seq_len + 1:,}"
            )
        self.identity = identity or self._identify()
        self.train = Part(self, 0, size - held_out)
        self.val = Part(self, size - held_out, size)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` bytes; a DataChanged if they are not those of the beginning any more."""
        self.check()
        content = os.pread(self.file.fileno(), count, start)
        while len(content) < count:  # of more than 2 GiB
            more = os.pread(self.file.fileno(), count - len(content), start + len(content))
            if not more:
                raise self._changed()
            content += more
        return np.frombuffer(content, np.uint8)

    def check(self) -> None:
        """A file that was touched, or copied over with the same bytes, is as good."""
        if self.stamp != (stamp := self._stamp()):
            if stamp[0] != self.identity["bytes"] or self._identify() != self.identity:
                raise self._changed()
            self.stamp = stamp

    def batch(self, seed: int, step: int, size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The share of `rank` in the `size` training sequences of a step.

        Returns:
            (size // world, seq_len + 1) uint8; the ranks' in order are what one process gets.
        """
        draws = np.random.Philox(key=seed, counter=[0, 0, 0, step]).random_raw(size)
        starts = draws % np.uint64(len(self.train) - self.seq_len)
        share = size // world
        return self._sequences(self.train, starts[rank * share : (rank + 1) * share])

    def windows(self, count: int, which: slice = slice(None)) -> np.ndarray:
        """Of `count` evenly spaced validation sequences some: (_, seq_len + 1) uint8."""
        starts = np.linspace(0, len(self.val) - self.seq_len - 1, count).astype(np.int64)
        return self._sequences(self.val, starts[which])

    @property
    def different_windows(self) -> int:
        return len(self.val) - self.seq_len

    def _sequences(self, data: Part, starts: np.ndarray) -> np.ndarray:
        return np.stack([data[int(start) : int(start) + self.seq_len + 1] for start in starts])

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def _identify(self) -> dict:
        digest, size = hashlib.sha256(), 0
        while block := os.pread(self.file.fileno(), BLOCK, size):
            digest.update(block)
            size += len(block)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def _changed(self) -> DataChanged:
        return DataChanged(f"--data {self.path}: the bytes changed while the run went on")


def prepare(
    source: Path | None,
    out: Path,
    seq_len: int,
    expected: dict | None = None,
    former: Path | None = None,
    raw: bool = False,
) -> Corpus:
    """The corpus of a run. What has no file of its own is written to `out`/data.bin, or not at all.

    Args:
        source: a raw file, or a .gz, .bz2 or .xz, or a .zip with one member, which their first
            bytes tell, too; None: the sources of this Python's standard library.
        out: the directory of the run, which exists.
        seq_len: see Corpus.
        expected: the identity that the corpus had when the run began, for one that is resumed.
        former: the directory of the run that this one goes on with, if it is another.
        raw: take the bytes of `source` as they are, whatever they are.

    Raises:
        TrainError: no such file, not a file, empty, too short, corrupt, of a kind that is not
            unpacked, or not what is expected.
    """
    kept = out / "data.bin"
    copies = [kept, former / "data.bin"] if former else [kept]
    copies = [path for path in copies if expected is not None and path.is_file()]
    if source is None:
        if copies:  # this Python may be another one
            return _kept(copies, out, seq_len, expected)
        return _write(_standard_library(), out, seq_len, expected)
    if not source.is_file():
        if copies and not source.exists():  # unpacked from what is gone
            return _kept(copies, out, seq_len, expected)
        raise TrainError(f"--data {source}: {'not a file' if source.exists() else 'no such file'}")
    with open(source, "rb") as file:
        head = file.read(HEAD)
    suffix = source.suffix.lower().removeprefix(".")
    kind = suffix if suffix in PACKED else packing(head)
    if raw or not (kind or foreign(head)):
        return _open(source, seq_len, expected)
    if expected is not None and source.stat().st_size == expected["bytes"]:
        corpus = Corpus(source, seq_len)
        if corpus.identity == expected:  # older versions took it as it is
            return corpus
    if kind is None:
        raise TrainError(
            f"--data {source}: {foreign(head)}: write what is in it to a file of plain bytes, or"
            " train on it as it is with --raw"
        )
    blocks = _unpack(source, kind)
    first = next(blocks, b"")
    if what := foreign(first) or packing(first):
        raise TrainError(f"--data {source}: unpacked, it is {what}: give a file of plain bytes")
    return _write(chain([first], blocks), out, seq_len, expected)


def packing(head: bytes) -> str | None:
    """How a file is packed that begins so, of what can be unpacked."""
    head = re.sub(b"^BZh[1-8]", b"BZh9", head)  # the size of its blocks
    return next((kind for kind, magic in PACKED.items() if head.startswith(magic)), None)


def foreign(head: bytes) -> str | None:
    """What a file is that begins so, of what is neither plain bytes nor unpacked."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for what, magic in FOREIGN.items() if head.startswith(magic)), None)


def _kept(copies: list[Path], out: Path, seq_len: int, expected: dict) -> Corpus:
    """What a run has unpacked, in the run's own directory."""
    corpus = _open(copies[0], seq_len, expected)
    if copies[0].parent == out:
        return corpus
    return _write(_blocks(open(copies[0], "rb")), out, seq_len, expected)


def _write(blocks: Iterator[bytes], out: Path, seq_len: int, expected: dict | None) -> Corpus:
    temporary, kept = out / "data.bin.tmp", out / "data.bin"
    try:
        try:
            with open(temporary, "wb") as file:
                for block in blocks:
                    file.write(block)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise TrainError(f"--data: no room for it in {out}: {error.strerror}") from error
        corpus = _open(temporary, seq_len, expected)
        publish(temporary, kept)
        corpus.path = kept
    finally:
        temporary.unlink(missing_ok=True)
    return corpus


def _open(path: Path, seq_len: int, expected: dict | None) -> Corpus:
    corpus = Corpus(path, seq_len)
    if expected not in (None, corpus.identity):
        raise TrainError(
            f"--data: the bytes changed since the run began: then {expected['bytes']:,} with sha256"
            f" {expected['sha256'][:12]}..., now {corpus.identity['bytes']:,} with"
            f" {corpus.identity['sha256'][:12]}..."
        )
    return corpus


def _standard_library() -> Iterator[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not {"site-packages", "dist-packages"} & {*name.split("/")}]
    if not names:
        raise TrainError(f"this Python has no library sources under {root}: give --data FILE")
    return ((root / name).read_bytes() for name in names)


def _blocks(file) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK):
            yield block


def _unpack(source: Path, kind: str) -> Iterator[bytes]:
    openers = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    try:
        if kind != "zip":
            yield from _blocks(openers[kind](source))
            return
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise TrainError(f"--data {source}: must have one member, got {len(members)}")
            yield from _blocks(archive.open(members[0]))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of what is on it
        raise TrainError(f"--data {source}: corrupt .{kind} file: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: its method, or encrypted
        raise TrainError(f"--data {source}: cannot be unpacked: {error}") from error
    except (ValueError, LookupError, OverflowError, struct.error) as error:  # zipfile: its headers
        raise TrainError(f"--data {source}: corrupt .{kind} file: {error}") from error
