"""`shtx data`: what is in the files that a run would train on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from shtx.train import TrainError, visible
from shtx.train.data import SPLIT, check_split, split_sizes
from shtx.train.files import BLOCK
from shtx.train.sources import blocks_in, expand, kinds_of, unescape
from shtx.train.store import Store
from shtx.train.tokens import SUFFIXES, Description, Tokens, description_of, tokens_of

DESCRIPTION = """\
What is in files, as `shtx train --data` takes them: how they are packed, bytes, documents, entropy,
where the parts of a split begin and end, and the sha256 of it all, by which a run knows its data.

Entropy of order n is what a byte takes by a table of how often it follows the n bytes before it, of
these very bytes: a bound that a model should be well below, and too low where most of the contexts
are rare. `shtx data prepare` makes token ids of files: see `shtx data prepare --help`.

Examples:
  shtx data enwik8.zip --split 0.9 0.05 0.05
  shtx data books/ --separator '\\0' --json
  shtx data prepare books/ --tokenizer tokenizer.json --out books.bin
"""
CHUNK = 16 * BLOCK  # bytes that are counted at a time
MOST_GRAMS = 1 << 24  # different ones that are counted, for 12 bytes of memory each
ORDERS = range(4)


@dataclass(frozen=True, kw_only=True)
class Options:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files, directories or patterns, plain or packed."""
    separator: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    r"""What is between two documents, with \n, \t, \r, \0, \\ and \xNN as `shtx train` has them; it
    is put between two files, too. None: documents are not counted."""
    split: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARE...")] = SPLIT
    """Shares for training, for validation and, if there is a third one, for the test."""
    num_tokens: int | None = None
    """Vocabulary of files of token ids, .bin or .npy; None: bytes, or what `shtx data prepare` has
    left beside a file."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """Integer type of the token ids; None: uint16 where --num-tokens allows it."""
    raw: bool = False
    """Take the bytes of files as they are, packed or not."""
    json: bool = False
    """Print all of it as JSON."""


class Grams:
    """Counts how often each sequence of `order` + 1 bytes occurs.

    Attributes:
        counted: how many sequences were counted: all until there were MOST_GRAMS different ones.
    """

    def __init__(self, order: int):
        self.order, self.counted, self.full = order, 0, False
        self.codes, self.counts = np.empty(0, np.uint32), np.empty(0, np.int64)

    def add(self, chunk: np.ndarray) -> None:
        """Count the sequences in a chunk of bytes (N,), whose first `order` were seen before."""
        count = len(chunk) - self.order
        if self.full or count < 1:
            return
        codes = np.zeros(count, np.uint32)
        for i in range(self.order + 1):
            codes = codes << np.uint32(8) | chunk[i : i + count]
        new, counts = np.unique(codes, return_counts=True)
        codes = np.union1d(self.codes, new)
        both = np.zeros(len(codes), np.int64)
        both[np.searchsorted(codes, self.codes)] = self.counts
        both[np.searchsorted(codes, new)] += counts
        self.codes, self.counts, self.counted = codes, both, self.counted + count
        self.full = len(codes) > MOST_GRAMS

    def entropy(self) -> float | None:
        """Bits that the last byte takes if those before it are known; None without any."""
        if not self.counted:
            return None
        contexts = self.codes >> np.uint32(8)
        begins = np.flatnonzero(np.concatenate(([True], contexts[1:] != contexts[:-1])))
        totals = np.add.reduceat(self.counts, begins)
        repeats = np.diff(np.append(begins, len(contexts)))
        shares = self.counts / np.repeat(totals, repeats)
        return float(-(self.counts * np.log2(shares)).sum() / self.counted)


class Documents:
    """Counts the documents of a stream that have a byte, by the separator between them."""

    def __init__(self, separator: bytes):
        self.separator, self.closed, self.open, self.tail = separator, 0, False, b""

    def add(self, block: bytes) -> None:
        *whole, rest = (self.tail + block).split(self.separator)
        for document in whole:
            self.closed += self.open or bool(document)
            self.open = False
        known = max(0, len(rest) - len(self.separator) + 1)  # a separator may end in the next block
        self.open, self.tail = self.open or known > 0, rest[known:]

    @property
    def count(self) -> int:
        return self.closed + (self.open or bool(self.tail))


class Counts:
    """The figures of a stream of bytes, counted as it passes."""

    def __init__(self, separator: bytes):
        self.size, self.digest = 0, hashlib.sha256()
        self.documents = Documents(separator) if separator else None
        self.grams = [Grams(order) for order in ORDERS]
        self.chunk, self.carried = bytearray(), 0

    def add(self, block: bytes) -> None:
        self.size += len(block)
        self.digest.update(block)
        if self.documents:
            self.documents.add(block)
        self.chunk += block
        if len(self.chunk) >= CHUNK:
            self._count()

    def _count(self) -> None:
        chunk = np.frombuffer(bytes(self.chunk), np.uint8)
        for grams in self.grams:
            # the chunk begins with the last bytes of the one before it, as many as ORDERS need
            before = min(self.carried, grams.order)
            grams.add(chunk[self.carried - before :])
        self.carried = min(len(chunk), ORDERS[-1])
        self.chunk = bytearray(chunk[len(chunk) - self.carried :].tobytes())

    def figures(self) -> dict:
        if len(self.chunk) > self.carried:
            self._count()
        figures = {"bytes": self.size, "sha256": self.digest.hexdigest()}
        if self.documents:
            figures["documents"] = self.documents.count
        return figures | {
            "entropy_bits_per_byte": [grams.entropy() for grams in self.grams],
            "entropy_bytes": [grams.counted for grams in self.grams],
        }


def main(argv: list[str]) -> int:
    """Print what is in the files."""
    if argv[:1] == ["prepare"]:
        from shtx.train import encode

        return encode.main(argv[1:])
    options = tyro.cli(Options, args=argv, prog="shtx data", description=DESCRIPTION)
    if not options.files:
        raise TrainError("give a FILE at least")
    check_split(options.split)
    described = None if options.raw else description_of(options.files, "FILE")
    tokens = tokens_of(options.num_tokens, options.token_dtype) or described and described.tokens
    figures = of_tokens(options, tokens, described) if tokens else of_bytes(options)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        print("\n".join(map(visible, lines(figures))))
    return 0


def of_bytes(options: Options) -> dict:
    separator = unescape(options.separator)
    paths = expand(options.files, "FILE")
    counts, listed = Counts(separator), []
    for path, kind in zip(paths, kinds_of(paths, options.raw, "FILE"), strict=True):
        if listed:
            counts.add(separator)
        before = counts.size
        for block in blocks_in(path, kind, separator, "FILE"):
            counts.add(block)
        listed.append(
            {
                "path": str(path),
                "kind": kind or "plain",
                "size": path.stat().st_size,
                "bytes": counts.size - before,
            }
        )
    parts = parts_of(counts.size, options.split)
    return {"files": listed, "unit": "byte", **counts.figures(), "split": parts}


def of_tokens(options: Options, tokens: Tokens, described: Description | None) -> dict:
    paths = expand(options.files, "FILE", SUFFIXES)
    store = Store(paths, tokens=tokens, flag="FILE")
    counts = np.zeros(tokens.num_tokens, np.int64)
    for _, _, block in store.blocks():
        ids, times = np.unique(np.frombuffer(block, tokens.dtype), return_counts=True)
        counts[ids] += times
    shares = counts[counts > 0] / len(store)
    listed = [
        {
            "path": str(path),
            "kind": f"token ids of {tokens.dtype}",
            "size": path.stat().st_size,
            "tokens": piece.size // store.itemsize,
        }
        for path, piece in zip(paths, store.pieces, strict=True)
    ]
    return {
        "files": listed,
        "unit": "token",
        "tokens": len(store),
        "sha256": store.identity["sha256"],
        "num_tokens": tokens.num_tokens,
        "tokens_that_occur": len(shares),
        "bytes_per_token": described and described.bytes / described.count,
        "entropy_bits_per_token": [float(-(shares * np.log2(shares)).sum())],
        "entropy_tokens": [len(store)],
        "split": parts_of(len(store), options.split),
    }


def parts_of(size: int, split: tuple[float, ...]) -> dict[str, list[int]]:
    """Return where each part begins and ends."""
    stops = np.cumsum(split_sizes(size, split)).tolist()
    starts = [0, *stops[:-1]]
    parts = zip(("train", "val", "test"), starts, stops, strict=False)
    return {name: [start, stop] for name, start, stop in parts}


def lines(figures: dict) -> Iterator[str]:
    """The figures as text."""
    unit = figures["unit"]
    units = f"{unit}s"
    for file in figures["files"]:
        packed = "" if file["kind"] == "plain" else f" in {file['size']:,} bytes of the file"
        yield f"{file['path']}: {file['kind']}, {file[units]:,} {units}{packed}"
    yield f"{figures[units]:,} {units}, sha256 {figures['sha256']}"
    if "documents" in figures:
        yield f"{figures['documents']:,} documents"
    if unit == "token":
        known = figures["bytes_per_token"]
        yield (
            f"{figures['tokens_that_occur']:,} of {figures['num_tokens']:,} tokens occur,"
            f" {f'{known:.3f}' if known else 'nobody knows how many'} bytes per token"
        )
    entropies = zip(figures[f"entropy_bits_per_{unit}"], figures[f"entropy_{units}"], strict=True)
    for order, (bits, counted) in enumerate(entropies):
        if bits is not None:
            whole = counted + order == figures[units]
            of = "" if whole else f" over the first {counted + order:,} {units}"
            yield f"entropy of order {order}: {bits:.4f} bits per {unit}{of}"
    for name, (start, stop) in figures["split"].items():
        yield f"{name}: {units} {start:,} to {stop:,}"
