"""`shtx data prepare`: token ids of text, by a tokenizer of Hugging Face's."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from shtx.train import TrainError, files
from shtx.train.sources import blocks_in, expand, kinds_of, unescape
from shtx.train.tokens import Description, Tokens, beside, smallest_dtype

DESCRIPTION = """\
Make token ids of text: OUT.bin, and beside it OUT.bin.json, which tells `shtx train --data OUT.bin`
the vocabulary and how many bytes a token stands for, so that it knows the bits per byte.

Text is tokenized in pieces that end before the end of a line where a letter or a digit is the last
character, about 256 thousand characters each: a tokenizer that treats the beginning of a text in a
way of its own does so with each piece. Special tokens are those that the text, or --separator, has.

Examples:
  shtx data prepare books/ --tokenizer tokenizer.json --out books.bin
  shtx data prepare books.tar.zst --tokenizer gpt2 --separator '<|endoftext|>' --out books.bin
"""
PIECE = 1 << 18  # characters
BATCH = 16  # pieces that are tokenized side by side


@dataclass(frozen=True, kw_only=True)
class Options:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files, directories or patterns with text in UTF-8, plain or packed."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH|NAME")]
    """A tokenizer.json, a directory with one, or the name of a model on the Hugging Face Hub."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.bin")]
    """A new file for the token ids: uint16, or uint32 if there are more than 65,536."""
    separator: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    r"""What comes between two files, and between two members of an archive; with \n, \t, \r, \0, \\
    and \xNN as `shtx train` has them."""


def main(argv: list[str]) -> int:
    """Write what the arguments ask for."""
    options = tyro.cli(Options, args=argv, prog="shtx data prepare", description=DESCRIPTION)
    if not options.files:
        raise TrainError("give a FILE at least")
    if options.out.suffix != ".bin":
        raise TrainError(f"--out {options.out}: must end in .bin")
    for path in (options.out, beside(options.out)):
        if path.exists():
            raise TrainError(f"--out {path}: is there already")
    tokenizer = load_tokenizer(options.tokenizer)
    num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if num_tokens < 1:
        raise TrainError(f"--tokenizer {options.tokenizer}: has no tokens")
    tokens = Tokens(num_tokens, smallest_dtype(num_tokens))
    files.make(options.out.absolute().parent)
    temporary = options.out.with_name(f"{options.out.name}.tmp")
    count = size = 0
    try:
        with open(temporary, "wb") as out:
            pieces = pieces_of(text_of(options.files, unescape(options.separator)))
            while batch := list(islice(pieces, BATCH)):
                size += sum(len(piece.encode()) for piece in batch)
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    ids = np.array(encoding.ids, tokens.dtype)
                    out.write(ids.tobytes())
                    count += len(ids)
        if not count:
            raise TrainError("FILE: there is no text to make tokens of")
        # first what is beside the file: without it the file would be taken for bytes
        Description(tokens, count, size, sha256_of(tokenizer)).write(options.out)
        files.publish(temporary, options.out)
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"{options.out}: {count:,} tokens of {num_tokens:,} different ones, {tokens.dtype},"
        f" {size / count:.3f} bytes per token"
    )
    return 0


def load_tokenizer(name: str):
    """Load the `tokenizers.Tokenizer` that --tokenizer names."""
    if find_spec("tokenizers") is None:
        raise TrainError('--tokenizer: tokenizers not installed: pip install "shtx[tokenizers]"')
    from tokenizers import Tokenizer

    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.exists() or path.suffix == ".json":
            return Tokenizer.from_file(str(path))
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # code in Rust raises errors of any kind
        what = " ".join(str(error).split())[:200]
        raise TrainError(f"--tokenizer {name}: cannot be loaded: {what}") from error


def sha256_of(tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def text_of(given: tuple[Path, ...], separator: bytes) -> Iterator[str]:
    """The text in files, block by block."""
    paths = expand(given, "FILE")
    for i, (path, kind) in enumerate(zip(paths, kinds_of(paths, False, "FILE"), strict=True)):
        rest, done = separator if i else b"", -len(separator) if i else 0
        for block in blocks_in(path, kind, separator, "FILE"):
            text, rest, done = decoded(path, rest + block, done, last=False)
            yield text
        yield decoded(path, rest, done, last=True)[0]


def decoded(path: Path, content: bytes, done: int, last: bool) -> tuple[str, bytes, int]:
    """The characters of some bytes, those of an unfinished one, and how many are done by then.

    Raises:
        TrainError: they are not UTF-8; it names the first byte that is not, from `done` on.
    """
    try:
        return content.decode(), b"", done + len(content)
    except UnicodeDecodeError as error:
        if last or error.reason != "unexpected end of data":
            raise TrainError(
                f"FILE {path}: must be UTF-8 text, got {error.object[error.start : error.end]!r} at"
                f" byte {done + error.start:,}"
            ) from error
        cut = error.start
        return content[:cut].decode(), content[cut:], done + cut


def pieces_of(text: Iterator[str]) -> Iterator[str]:
    """Text in pieces, each of which ends where most tokenizers end a token."""
    buffer = ""
    for block in text:
        buffer += block
        while len(buffer) >= 2 * PIECE:
            ends = re.compile(r"(?<=\w)\n").search(buffer, PIECE)
            cut = ends.start() if ends else len(buffer) if len(buffer) > 16 * PIECE else None
            if cut is None:
                break
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer
