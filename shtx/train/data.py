"""Data to train on; a batch is a pure function of (seed, step, rank)."""

import errno
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from shtx.train import TrainError
from shtx.train.files import publish
from shtx.train.sources import (
    NoSuchFile,
    blocks_in,
    blocks_of,
    expand,
    kinds_of,
)
from shtx.train.store import Part, Store
from shtx.train.tokens import SUFFIXES, Tokens

SPLIT = (0.9, 0.1)
FLAGS = {"data": "--data", "val": "--val-data", "test": "--test-data"}
MAX_OPEN = 128  # files that are read where they lie; more of them are copied into one
LARGE = 1 << 28  # bytes, which take a moment to read
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Source:
    """The files that a run's data comes from, and how they are read.

    Attributes:
        data: files, directories and patterns, see `expand`; none: the sources of this Python's
            standard library.
        val: others, for validation, in place of a part of `data`.
        test: others, to test the trained model by, in place of a part of `data`.
        split: the shares of `data` for training, validation and test, in its order; None: all of it
            for training if `val` has files, else SPLIT.
        separator: bytes between two files, and between two members of an archive.
        raw: take the bytes of files as they are, whatever they are.
        tokens: what the files hold, if it is token ids in place of bytes.
    """

    data: tuple[Path, ...] = ()
    val: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    split: tuple[float, ...] | None = None
    separator: bytes = b""
    raw: bool = False
    tokens: Tokens | None = None


def check_split(split: Sequence[float]) -> None:
    """Raise a TrainError for a --split that is none."""
    whole = all(0 < share < 1 for share in split) and sum(Fraction(str(s)) for s in split) == 1
    if len(split) not in (2, 3) or not whole:
        given = " ".join(map(str, split))
        raise TrainError(f"--split must be 2 or 3 positive shares that add up to 1, got {given}")


def split_sizes(size: int, split: Sequence[float]) -> list[int]:
    """Parts of `size` in these shares, all but the first rounded down."""
    others = [int(size * Fraction(str(share))) for share in split[1:]]
    return [size - sum(others), *others]


class Corpus:
    """Training, validation and, perhaps, test data.

    Args:
        store: what is divided; it stays where it is and is read piece by piece.
        seq_len: bytes, or tokens, that a model sees at once; a sequence has one more, the last
            target.
        split: shares of the store for training, validation and test, in its order; None: all of it
            for training if there is a `val`, else SPLIT.
        val, test: other stores, which take the place of these parts.

    Attributes:
        train, val, test: the parts; `test` may be None, and nothing here reads it.
        identity: sizes and sha256 of the stores.

    Raises:
        TrainError: a part is shorter than seq_len + 1.
    """

    def __init__(
        self,
        store: Store,
        seq_len: int,
        split: Sequence[float] | None = None,
        val: Store | None = None,
        test: Store | None = None,
    ):
        self.store, self.seq_len = store, seq_len
        others = {"val": val, "test": test}
        self.others = {name: other for name, other in others.items() if other}
        parts, start = {}, 0
        sizes = split_sizes(len(store), split or ((1.0,) if val else SPLIT))
        for name, size in zip(("train", "val", "test"), sizes, strict=False):
            parts[name] = Part(store, start, start + size)
            start += size
        parts |= {name: Part(other, 0, len(other)) for name, other in self.others.items()}
        self.train, self.val, self.test = parts["train"], parts["val"], parts.get("test")
        unit = "tokens" if store.tokens else "bytes"
        whats = {"train": "training", "val": "validation", "test": "the test"}
        for name, part in parts.items():
            if len(part) < seq_len + 1:
                whole = len(part.store)
                share = "" if len(part) == whole else f" the {len(part):,} of them"
                raise TrainError(
                    f"{part.store.flag}: {whole:,} {unit} are too few:{share} for {whats[name]}"
                    f" must be at least seq_len + 1 = {seq_len + 1:,}"
                )

    @property
    def identity(self) -> dict:
        return self.store.identity | {name: s.identity for name, s in self.others.items()}

    def check(self) -> None:
        """Raise a DataChanged if any of the data is not that of the beginning any more."""
        for store in (self.store, *self.others.values()):
            store.check()

    def batch(self, seed: int, step: int, size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The share of `rank` in the `size` training sequences of a step.

        Returns:
            (size // world, seq_len + 1) uint8, or int64 token ids; the ranks' in order are what one
            process gets.
        """
        draws = np.random.Philox(key=seed, counter=[0, 0, 0, step]).random_raw(size)
        starts = draws % np.uint64(len(self.train) - self.seq_len)
        share = size // world
        return self._sequences(self.train, starts[rank * share : (rank + 1) * share])

    def windows(self, count: int, which: slice = slice(None)) -> np.ndarray:
        """Return some of `count` evenly spaced validation sequences: (_, seq_len + 1)."""
        starts = np.linspace(0, len(self.val) - self.seq_len - 1, count).astype(np.int64)
        return self._sequences(self.val, starts[which])

    @property
    def different_windows(self) -> int:
        return len(self.val) - self.seq_len

    def _sequences(self, data: Part, starts: np.ndarray) -> np.ndarray:
        return np.stack([data[int(start) : int(start) + self.seq_len + 1] for start in starts])


def prepare(
    source: Source,
    out: Path,
    seq_len: int,
    expected: dict | None = None,
    former: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """The corpus of a run.

    Up to MAX_OPEN plain files are read where they lie. If one is packed, or there are more, all are
    written into one, `out`/data.bin (val.bin, test.bin).

    Args:
        source: where it comes from.
        out: the directory of the run, which exists.
        seq_len: see Corpus.
        expected: the identity that the corpus had when the run began, for one that is resumed.
        former: the directory of the run that this one goes on with, if it is another.
        say: is told what takes a moment.

    Raises:
        TrainError: no such file, not a file, not readable, empty, too short, corrupt, of a kind
            that is not unpacked, or not what is expected.
    """
    folders, stores = [folder for folder in (out, former) if folder], {}
    try:
        for name in FLAGS:
            if name == "data" or getattr(source, name):
                of_it = expected if name == "data" else expected and expected.get(name)
                known = of_it and {key: of_it[key] for key in ("bytes", "sha256")}
                stores[name] = _Opening(source, name, folders, known, say).store()
        others = {name: store for name, store in stores.items() if name != "data"}
        corpus = Corpus(stores["data"], seq_len, source.split, **others)
        for name, store in stores.items():
            kept = out / f"{name}.bin"
            if store.paths == [temporary := _temporary(kept)]:
                publish(temporary, kept)
                store.moved(kept)
    finally:
        for name in FLAGS:
            _temporary(out / f"{name}.bin").unlink(missing_ok=True)
    return corpus


def _temporary(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.tmp")


def reopen(source: Source, home: Path | None, expected: dict, folder: Path) -> Corpus:
    """The corpus of a run, as its directory still has it, or its files.

    Args:
        source: where the run's data came from.
        home: the directory of the run, if it is known.
        expected: the identity of its data.
        folder: a directory for what has to be unpacked again.

    Raises:
        TrainError: see `prepare`.
    """
    copies = {name: home / f"{name}.bin" for name in FLAGS} if home else {}
    copies = {name: (path,) for name, path in copies.items() if path.is_file()}
    return prepare(replace(source, **copies), folder, 0, expected)


@dataclass(frozen=True)
class _Opening:
    """Opens one store of a run: `name` is "data", "val" or "test". `folders` are the run's own and
    that of the run it goes on from.
    """

    source: Source
    name: str
    folders: list[Path]
    expected: dict | None
    say: Callable[[str], None]

    def store(self) -> Store:
        source, files, flag = self.source, getattr(self.source, self.name), FLAGS[self.name]
        copies = [folder / f"{self.name}.bin" for folder in self.folders]
        copies = [path for path in copies if self.expected is not None and path.is_file()]
        if not files:
            # this Python may be another one
            return self._kept(copies) if copies else self._write(_standard_library())
        try:
            paths = expand(files, flag, SUFFIXES if source.tokens else ())
        except NoSuchFile:
            if copies:  # unpacked from what is gone
                return self._kept(copies)
            raise
        size = sum(path.stat().st_size for path in paths)
        if size >= LARGE:
            what = paths[0] if len(paths) == 1 else f"{len(paths):,} files"
            self.say(f"reading {size / 1e9:.1f} GB of {what}")
        if source.tokens:
            if len(paths) > MAX_OPEN:
                raise TrainError(f"{flag}: at most {MAX_OPEN} token files, got {len(paths):,}")
            return self._open(paths)
        try:
            kinds = kinds_of(paths, source.raw, flag)
        except TrainError:
            if store := self._as_it_is(paths, size):
                return store
            raise
        if not any(kinds) and len(paths) <= MAX_OPEN:
            return self._open(paths)
        return self._as_it_is(paths, size) or self._write(self._joined(paths, kinds))

    def _as_it_is(self, paths: list[Path], size: int) -> Store | None:
        """Older versions trained on some packed files without unpacking them."""
        if self.expected and len(paths) == 1 and size == self.expected["bytes"]:
            store = Store(paths, flag=FLAGS[self.name])
            if store.identity == self.expected:
                return store
        return None

    def _joined(self, paths: list[Path], kinds: list[str | None]) -> Iterator[bytes]:
        flag, separator = FLAGS[self.name], self.source.separator
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
            if i:
                yield separator
            yield from blocks_in(path, kind, separator, flag)

    def _kept(self, copies: list[Path]) -> Store:
        """Open what a run has unpacked; copy it into the run's own directory if it is elsewhere."""
        store = self._open(copies[:1])
        if copies[0].parent == self.folders[0]:
            return store
        return self._write(blocks_of(open(copies[0], "rb")))

    def _write(self, blocks: Iterator[bytes]) -> Store:
        out = self.folders[0]
        temporary = _temporary(out / f"{self.name}.bin")
        try:
            with open(temporary, "wb") as file:
                for block in blocks:
                    file.write(block)
        except OSError as error:
            if error.errno not in FULL:
                raise
            flag = FLAGS[self.name]
            raise TrainError(f"{flag}: no room for it in {out}: {error.strerror}") from error
        return self._open([temporary])

    def _open(self, paths: list[Path]) -> Store:
        source, flag = self.source, FLAGS[self.name]
        store = Store(paths, source.separator, source.tokens, flag)
        if self.expected not in (None, store.identity):
            then, now = (
                f"{identity['bytes']:,} with sha256 {identity['sha256'][:12]}..."
                for identity in (self.expected, store.identity)
            )
            raise TrainError(
                f"{flag}: the bytes changed since the run began: then {then}, now {now}"
            )
        return store


def _standard_library() -> Iterator[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not {"site-packages", "dist-packages"} & {*name.split("/")}]
    if not names:
        raise TrainError(f"this Python has no library sources under {root}: give --data FILE")
    return ((root / name).read_bytes() for name in names)
