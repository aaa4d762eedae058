"""Three corpora to compare models on, made of packages of Debian: C++, Python, English.

    python -m benchmarks.studies.quality.corpora OUT
    shtx train --data OUT/python.bin --split 0.9 0.05 0.05

Writes OUT/cpp.bin, python.bin and english.bin, of up to 64 MB each (--megabytes), and prints for
each its bytes, documents, sha256 and the packages with their versions: a corpus is the same one
where its sha256 is. Documents are files, and pages of dictionaries, each once, in the order of
their sha256, so that every part of a corpus has some of every package; a zero byte is between two
of them, and the last one is cut where the corpus is full. Needs apt-get and dpkg-deb, and leaves
the packages in OUT/packages.
"""

import argparse
import gzip
import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SEPARATOR = b"\0"
PAGE = 1 << 16  # bytes


class Recipe(NamedTuple):
    """The files that make a corpus: those of these packages whose names end with a suffix."""

    packages: tuple[str, ...]
    suffixes: tuple[str, ...]


RECIPES = {
    "cpp": Recipe(("libboost1.81-dev",), (".hpp", ".h", ".ipp")),
    "python": Recipe(
        ("python3-sympy", "python3-django", "python3-pandas", "python3-sklearn", "python3-twisted"),
        (".py",),
    ),
    "english": Recipe(("dict-gcide", "dict-wn"), (".dict.dz",)),
}


class Corpus(NamedTuple):
    path: Path
    size: int
    documents: int
    sha256: str


def download(package: str, folder: Path) -> Path:
    """The package of this machine's Debian, downloaded unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        found = sorted(folder.glob(f"{package}_*.deb"))
    return found[-1]


def documents(package: Path, suffixes: tuple[str, ...]) -> Iterator[bytes]:
    """Read a package's files; a dictionary (.dz) page by page."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(suffixes):
                    content = archive.extractfile(member).read()
                    if member.name.endswith(".dz"):
                        yield from pages(gzip.decompress(content))
                    else:
                        yield content
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{package}: dpkg-deb ended with {process.returncode}")


def pages(text: bytes) -> Iterator[bytes]:
    """Pieces of at least PAGE bytes, each of whole lines."""
    start = 0
    while start < len(text):
        stop = text.find(b"\n", start + PAGE) + 1 or len(text)
        yield text[start:stop]
        start = stop


def build(path: Path, packages: list[Path], suffixes: tuple[str, ...], most: int) -> Corpus:
    """Write a corpus of at most so many bytes."""
    found = (document for package in packages for document in documents(package, suffixes))
    different = {hashlib.sha256(document).digest(): document for document in found if document}
    digest, size, count = hashlib.sha256(), 0, 0
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        for key in sorted(different):
            content = (SEPARATOR if count else b"") + different[key]
            content = content[: most - size]
            if len(content) <= len(SEPARATOR):
                break
            size, count = size + file.write(content), count + 1
            digest.update(content)
    os.replace(temporary, path)
    return Corpus(path, size, count, digest.hexdigest())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory")
    parser.add_argument("--names", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--megabytes", type=int, default=64, help="of each, at most; 64")
    options = parser.parse_args(argv)
    if options.megabytes < 1:
        parser.error(f"--megabytes must be at least 1, got {options.megabytes}")
    for name in options.names:
        recipe = RECIPES[name]
        packages = [download(package, options.out / "packages") for package in recipe.packages]
        path = options.out / f"{name}.bin"
        made = build(path, packages, recipe.suffixes, options.megabytes * 10**6)
        print(f"{path}: {made.size:,} bytes, {made.documents:,} documents, sha256 {made.sha256}")
        print(f"  of {', '.join(package.stem for package in packages)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
