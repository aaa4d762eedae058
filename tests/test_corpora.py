"""The corpora of Debian's packages, of a tiny one."""

import gzip
import shutil
import subprocess
from hashlib import sha256

import pytest

from benchmarks.studies.quality import corpora

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb packs it")


IN_ORDER = sorted([b"first", b"second"], key=lambda document: sha256(document).digest())


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "root"
    for name, content in {
        "usr/b.py": b"second",
        "usr/a.py": b"first",
        "usr/c/d.py": b"first",  # again
        "usr/e.py": b"",
        "usr/f.txt": b"no source",
        "usr/words.dict.dz": gzip.compress(b"a dictionary\nof lines\nend"),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "DEBIAN").mkdir()
    control = "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (root / "DEBIAN" / "control").write_text(control)
    packages = tmp_path / "out" / "packages"
    packages.mkdir(parents=True)
    command = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(packages / "tiny_1_all.deb")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return packages / "tiny_1_all.deb"


def test_the_command(package, monkeypatch, capsys):
    """A corpus of what is downloaded already; its line says what it is."""
    monkeypatch.setattr(corpora, "RECIPES", {"python": corpora.Recipe(("tiny",), (".py",))})
    out = package.parent.parent
    corpora.main([str(out)])
    content = b"\0".join(IN_ORDER)
    assert (out / "python.bin").read_bytes() == content
    digest = sha256(content).hexdigest()
    assert capsys.readouterr().out == (
        f"{out / 'python.bin'}: 12 bytes, 2 documents, sha256 {digest}\n  of tiny_1_all\n"
    )


@pytest.mark.parametrize("most", [5, 6, 9, 12, 100])
def test_it_ends_where_it_is_full(package, tmp_path, most):
    """No document is left that is nothing but a separator."""
    made = corpora.build(tmp_path / "x.bin", [package], (".py",), most)
    content = b"\0".join(IN_ORDER)[:most].rstrip(b"\0")
    assert (tmp_path / "x.bin").read_bytes() == content
    assert (made.size, made.sha256) == (len(content), sha256(content).hexdigest())


def test_dictionaries_are_cut_into_pages(package, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PAGE", 5)
    pages = [b"a dictionary\n", b"of lines\n", b"end"]
    assert list(corpora.pages(b"".join(pages))) == pages
    corpora.build(tmp_path / "x.bin", [package, package], (".dict.dz",), 100)
    assert sorted((tmp_path / "x.bin").read_bytes().split(b"\0")) == sorted(pages)


def test_bad_size(tmp_path, capsys):
    with pytest.raises(SystemExit):
        corpora.main([str(tmp_path), "--megabytes", "0"])
    assert "--megabytes must be at least 1, got 0" in capsys.readouterr().err
