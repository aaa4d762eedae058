"""Bytes to train on, as a memmap; a batch is a pure function of (seed, step, rank)."""

import gzip
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shtx.train import TrainError
from shtx.train.files import BLOCK, publish, sha256

PACKED = (".gz", ".zip")


class Corpus:
    """A file of bytes; its last tenth is for validation.

    Args:
        path: the file, which stays where it is and is mapped, not read.
        seq_len: bytes a model sees at once; a sequence has one more, the last target.

    Raises:
        TrainError: either part is shorter than seq_len + 1 bytes.
    """

    def __init__(self, path: Path, seq_len: int):
        size = path.stat().st_size
        held_out = size // 10
        if held_out < seq_len + 1:  # the other part is longer
            raise TrainError(
                f"--data: {size:,} bytes are too few: the last tenth, for validation, must have"
                f" at least seq_len + 1 = {seq_len + 1:,}"
            )
        self.path, self.seq_len = path, seq_len
        self.identity = {"bytes": size, "sha256": sha256(path)}
        data = np.memmap(path, dtype=np.uint8, mode="r")
        self.train, self.val = data[: size - held_out], data[size - held_out :]

    def batch(self, seed: int, step: int, size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The share of `rank` in the `size` training sequences of a step.

        Returns:
            (size // world, seq_len + 1) uint8; the ranks' in order are what one process gets.
        """
        draws = np.random.Philox(key=seed, counter=[0, 0, 0, step]).random_raw(size)
        starts = draws % np.uint64(len(self.train) - self.seq_len)
        share = size // world
        return self._sequences(self.train, starts[rank * share : (rank + 1) * share])

    def windows(self, count: int) -> np.ndarray:
        """The `count` evenly spaced validation sequences: (count, seq_len + 1) uint8."""
        starts = np.linspace(0, len(self.val) - self.seq_len - 1, count).astype(np.int64)
        return self._sequences(self.val, starts)

    def _sequences(self, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return np.stack([data[int(start) : int(start) + self.seq_len + 1] for start in starts])


def prepare(
    source: Path | None,
    out: Path,
    seq_len: int,
    expected: dict | None = None,
    former: Path | None = None,
) -> Corpus:
    """The corpus of a run. What has no file of its own is written to `out`/data.bin, or not at all.

    Args:
        source: a raw file, or a .gz or a .zip with one member; None: the sources of this Python's
            standard library.
        out: the directory of the run, which exists.
        seq_len: see Corpus.
        expected: the identity that the corpus had when the run began, for one that is resumed.
        former: the directory of the run that this one goes on with, if it is another.

    Raises:
        TrainError: no such file, not a file, empty, too short, corrupt, or not what is expected.
    """
    kept = out / "data.bin"
    copies = [kept, former / "data.bin"] if former else [kept]
    copies = [path for path in copies if expected is not None and path.is_file()]
    if source is not None and not source.is_file():
        if copies and not source.exists():  # unpacked from what is gone
            return _kept(copies, out, seq_len, expected)
        raise TrainError(f"--data {source}: {'not a file' if source.exists() else 'no such file'}")
    if source is not None and source.suffix.lower() not in PACKED:
        return _open(source, seq_len, expected)
    if source is None and copies:  # this Python may be another one
        return _kept(copies, out, seq_len, expected)
    return _write(
        _standard_library() if source is None else _unpack(source), out, seq_len, expected
    )


def _kept(copies: list[Path], out: Path, seq_len: int, expected: dict) -> Corpus:
    """What a run has unpacked, in the run's own directory."""
    corpus = _open(copies[0], seq_len, expected)
    return corpus if copies[0].parent == out else _write(_blocks(copies[0]), out, seq_len, expected)


def _write(blocks: Iterator[bytes], out: Path, seq_len: int, expected: dict | None) -> Corpus:
    temporary, kept = out / "data.bin.tmp", out / "data.bin"
    try:
        with open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
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


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def _unpack(source: Path) -> Iterator[bytes]:
    try:
        if source.suffix.lower() == ".gz":
            with gzip.open(source) as file:
                while block := file.read(BLOCK):
                    yield block
            return
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise TrainError(f"--data {source}: must have one member, got {len(members)}")
            with archive.open(members[0]) as file:
                while block := file.read(BLOCK):
                    yield block
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise TrainError(f"--data {source}: corrupt {source.suffix} file: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: its method, or encrypted
        raise TrainError(f"--data {source}: cannot be unpacked: {error}") from error
