"""Files to train on: which ones the arguments name, how they are packed, and what is in them."""

import bz2
import gzip
import io
import lzma
import os
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

from shtx.train import TrainError
from shtx.train.files import BLOCK

# formats that are unpacked, by their first bytes
PACKED = {
    "gz": b"\x1f\x8b\x08",
    "zip": b"PK\x03\x04",
    "bz2": b"BZh91AY&SY",
    "xz": b"\xfd7zXZ\x00",
    "zst": b"\x28\xb5\x2f\xfd",
}
# formats that are refused: a model would be trained on noise or headers
FOREIGN = {
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
ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"0": b"\0", b"\\": b"\\"}  # those of --separator
HEAD = 512  # bytes that tell what a file is; a tar archive has its mark at 257
# Zstandard's decoder gives all that its input unpacks to at once, up to 32,768 times as much
ZSTD_BLOCK = 1 << 12


class NoSuchFile(TrainError):
    """A name that stands for no file."""


def unescape(separator: str) -> bytes:
    """The bytes that --separator stands for; a TrainError for an escape that is none."""

    def byte(escape: re.Match) -> bytes:
        what = escape[1]
        if what[:1] == b"x" and len(what) == 3:
            return bytes([int(what[1:], 16)])
        if what not in ESCAPES:
            known = ", ".join(rf"\{name.decode()}" for name in ESCAPES)
            raise TrainError(
                rf"--separator {separator!r}: \{what.decode(errors='replace')} is none of {known}"
                r" and \xNN"
            )
        return ESCAPES[what]

    return re.sub(rb"\\(x[0-9a-fA-F]{2}|.|$)", byte, os.fsencode(separator), flags=re.DOTALL)


def expand(given: Sequence[Path], flag: str, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files that arguments name, in their order.

    A directory stands for the files in it and in those below it, a pattern with *, ? or [...] for
    the files that it matches (** for directories at any depth): both sorted by name. Those whose
    name, or whose directory's, begins with a dot are left out, which a warning tells.

    Args:
        given: files, directories and patterns.
        flag: what names them, for messages.
        suffixes: of the files that a directory stands for; all by default.

    Raises:
        NoSuchFile: one of them stands for no file.
        TrainError: one is not readable, neither a file nor a directory, or named twice.
    """
    files = []
    for path in given:
        if path.is_dir():
            files += _visible_files(path, flag, suffixes)
        elif path.exists() or not has_magic(str(path)):
            files.append(path)
        elif matches := sorted(map(Path, glob(str(path), recursive=True))):
            files += [match for match in matches if not match.is_dir()]
        else:
            raise NoSuchFile(f"{flag} {path}: matches no file")
    named = set()
    for path in files:
        if not path.is_file():
            if path.exists():
                raise TrainError(f"{flag} {path}: not a file")
            raise NoSuchFile(f"{flag} {path}: no such file")
        if not os.access(path, os.R_OK):
            raise TrainError(f"{flag} {path}: not readable")
        if (real := path.resolve()) in named:
            raise TrainError(f"{flag} {path}: is named twice")
        named.add(real)
    return files


def _visible_files(folder: Path, flag: str, suffixes: tuple[str, ...]) -> list[Path]:
    def refuse(error: OSError):
        raise TrainError(f"{flag} {error.filename}: not readable: {error.strerror}") from error

    paths = (
        Path(place, name) for place, _, names in os.walk(folder, onerror=refuse) for name in names
    )
    paths = [path for path in paths if not suffixes or path.suffix.lower() in suffixes]
    shown = [path for path in paths if not is_hidden(path.relative_to(folder))]
    _tell_hidden(f"{flag} {folder}", len(paths) - len(shown))
    if not shown:
        kinds = f" that ends in {' or '.join(suffixes)}" if suffixes else ""
        raise NoSuchFile(f"{flag} {folder}: no file in it{kinds}")
    return sorted(shown, key=lambda path: path.relative_to(folder).as_posix())


def is_hidden(path: Path | PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _tell_hidden(name: str, count: int) -> None:
    if count:
        warnings.warn(f"{name}: hidden files are left out: {count:,}", stacklevel=2)


def packing(head: bytes) -> str | None:
    """Return how a file with this head is packed; None if it is not, or cannot be unpacked."""
    if head[257:262] == b"ustar":
        return "tar"
    head = re.sub(b"^BZh[1-8]", b"BZh9", head)  # the size of its blocks
    return next((kind for kind, magic in PACKED.items() if head.startswith(magic)), None)


def foreign(head: bytes) -> str | None:
    """Name the format of a file with this head, if nothing here can read it; else None."""
    return next((what for what, magic in FOREIGN.items() if head.startswith(magic)), None)


def kind_of(path: Path) -> str | None:
    """Return how a file is packed, by its suffix or its first bytes; None if it is not."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in (*PACKED, "tar") else packing(head_of(path))


def head_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def refuse_foreign(path: Path, flag: str) -> None:
    """Raise a TrainError for a file that is neither plain bytes nor unpacked."""
    if what := foreign(head_of(path)):
        hint = "; token ids take --num-tokens" if what == "a NumPy array" else ""
        raise TrainError(
            f"{flag} {path}: {what}: write what is in it to a file of plain bytes, or train on it"
            f" as it is with --raw{hint}"
        )


def blocks_of(file) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK):
            yield block


def blocks_in(path: Path, kind: str | None, separator: bytes, flag: str) -> Iterator[bytes]:
    """Read a file in blocks, by `unpack`; a kind of None takes its bytes as they are."""
    return blocks_of(open(path, "rb")) if kind is None else unpack(path, kind, separator, flag)


def kinds_of(paths: Sequence[Path], raw: bool, flag: str) -> list[str | None]:
    """Return how each file is packed: None for plain bytes, and for every file if `raw`.

    Raises:
        TrainError: one is neither plain bytes nor can be unpacked.
    """
    kinds = [None if raw else kind_of(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind is None and not raw:
            refuse_foreign(path, flag)
    return kinds


def unpack(path: Path, kind: str, separator: bytes, flag: str) -> Iterator[bytes]:
    """Unpack a file, as blocks of bytes.

    An archive gives its members, in its order, with the separator between two of them; a warning
    tells how many hidden ones are left out.

    Args:
        path: the file.
        kind: of `kind_of`.
        separator: what comes between two members.
        flag: what named the file, for messages.

    Raises:
        TrainError: it is corrupt or encrypted, has no member, or what it unpacks to is packed.
    """
    name = f"{flag} {path}"
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                names = [(member.filename, partial(archive.open, member)) for member in members]
                yield from _members(names, separator, name)
            return
        with io.BufferedReader(_opener(kind, name)(path), BLOCK) as file:
            if kind != "tar" and packing(file.peek(HEAD)) != "tar":
                yield from _plain(file, name)
                return
            kind = kind if kind == "tar" else f"tar.{kind}"
            with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive:
                members = (member for member in archive if member.isfile())
                names = ((member.name, partial(archive.extractfile, member)) for member in members)
                yield from _members(names, separator, name)
            while file.read(BLOCK):  # its checksum is at the end
                pass
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise TrainError(f"{name}: corrupt .{kind} file: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise  # the disk failed, not what is on it
        raise TrainError(f"{name}: corrupt .{kind} file: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: its method, or encrypted
        raise TrainError(f"{name}: cannot be unpacked: {error}") from error
    # zipfile raises these for damaged headers.
    except (EOFError, ValueError, LookupError, OverflowError, struct.error) as error:
        raise TrainError(f"{name}: corrupt .{kind} file: {error}") from error


def _members(
    members: Iterable[tuple[str, Callable]], separator: bytes, name: str
) -> Iterator[bytes]:
    count = hidden = 0
    for member, open_member in members:
        if is_hidden(PurePosixPath(member)):
            hidden += 1
            continue
        if count:
            yield separator
        count += 1
        yield from _plain(open_member(), name)
    _tell_hidden(name, hidden)
    if not count:
        raise TrainError(f"{name}: has no members that are files and not hidden")


def _plain(file, name: str) -> Iterator[bytes]:
    blocks = blocks_of(file)
    first = next(blocks, b"")
    if what := foreign(first) or packing(first):
        raise TrainError(f"{name}: unpacked, it is {what}: give a file of plain bytes")
    yield first
    yield from blocks


class _Member(tarfile.TarInfo):
    """A member whose header is whole: TarFile takes a damaged one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged or missing: {error}") from error


def _opener(kind: str, name: str) -> Callable:
    """A function that opens a file of this kind for what it unpacks to."""
    if kind == "zst":
        make, damage = _zstd(name)
        return lambda path: _Stream(_unpack_zstd(open(path, "rb"), make, damage))
    raw = partial(open, mode="rb", buffering=0)
    return {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "tar": raw}[kind]


def _zstd(name: str) -> tuple[Callable, type[Exception]]:
    """A function that makes a decompressor of one frame, and the error of a corrupt one."""
    try:
        from compression import zstd
    except ImportError:
        try:
            import zstandard
        except ImportError:
            raise TrainError(
                f'{name}: unpacking a .zst file takes Python 3.14 or pip install "shtx[zstd]"'
            ) from None
        window = 1 << 31  # that of zstd --ultra --long=31
        make = lambda: zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
        return make, zstandard.ZstdError
    return zstd.ZstdDecompressor, zstd.ZstdError


def _unpack_zstd(file, make: Callable, damage: type[Exception]) -> Iterator[bytes]:
    with file:
        frame = make()
        while block := file.read(ZSTD_BLOCK):
            while block:
                if frame.eof:
                    frame = make()
                try:
                    yield frame.decompress(block)
                except damage as error:
                    raise ValueError(error) from error
                block = frame.unused_data
        if not frame.eof:
            raise EOFError("ends before its end-of-frame mark")


class _Stream(io.RawIOBase):
    """Blocks of bytes as a file to read, which closes their source."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fills the buffer, unless this is the end."""
        done = 0
        while done < len(buffer):
            if not self.rest:
                if (block := next(self.blocks, None)) is None:
                    break
                self.rest = memoryview(block)
            count = min(len(buffer) - done, len(self.rest))
            buffer[done : done + count] = self.rest[:count]
            self.rest, done = self.rest[count:], done + count
        return done

    def close(self) -> None:
        self.blocks.close()
        super().close()
