"""The commit that ran: that of a stamp which the files agree with, or git's.

A stamp is a commit and a digest of the files that a benchmark runs: `python -m benchmarks commit`
prints it where git has the tree, `--commit STAMP` takes it where a copy of the tree is.
"""

import hashlib
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = "benchmarks", "shtx", "shtx_kernels"


def digest(root: Path = ROOT) -> str:
    """Return what changes with every file of Python that a benchmark may run."""
    found = hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        text = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return found.hexdigest()[:12]


def head(root: Path = ROOT) -> str | None:
    """Git's commit of the tree, None if it has none; a SystemExit if the files are in no commit."""

    def git(*args):
        return subprocess.check_output(
            ["git", "-C", root, *args], stderr=subprocess.DEVNULL, text=True
        ).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        changed = git(
            "status", "--porcelain", "--", *(f":(glob){name}/**/*.py" for name in FOLDERS)
        )
        commit = git("rev-parse", "--short=10", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    if changed:
        raise SystemExit(
            f"commit first, as results name what ran: {changed.splitlines()[0].strip()}"
        )
    return commit


def stamp(root: Path = ROOT) -> str:
    """Return the commit of the tree, as `--commit` takes it; a SystemExit if git has none."""
    if commit := head(root):
        return f"{commit}-{digest(root)}"
    raise SystemExit(f"git has no commit of {root}")


def resolve(given: str | None, root: Path = ROOT) -> str:
    """Return the commit for the record: that of a stamp, else git's, "unknown" if there is none.

    A stamp goes before git, as a copy may have git's folder of an earlier commit.

    Raises:
        SystemExit: if the files are in no commit, or not those of the stamp.
    """
    if not given:
        return head(root) or "unknown"
    if not re.fullmatch("[0-9a-f]{10,40}-[0-9a-f]{12}", given):
        raise SystemExit(
            f"--commit: {given!r} is not what `python -m benchmarks commit` prints where git is"
        )
    commit, _, files = given.partition("-")
    if files != (here := digest(root)):
        raise SystemExit(f"--commit: the files here are not those of {given}: digest is {here}")
    return commit
