"""Data of several files, directories and patterns, plain and packed, and how it is divided."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import re
import sys
import tarfile
import warnings
import zipfile
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import change_config, resume, rows, train, write_text

from shtx.cli import main
from shtx.train import TrainError
from shtx.train.arguments import parse
from shtx.train.checkpoint import find_steps, load
from shtx.train.config import Config
from shtx.train.data import SPLIT, Corpus, Source, prepare, split_sizes
from shtx.train.sources import expand, unescape
from shtx.train.store import DataChanged, Part, Store
from shtx.train.trainer import refuse_untrainable

TEXT = np.random.default_rng(1).integers(0, 256, 6000, dtype=np.uint8).tobytes()
A, B, C = TEXT[:2500], TEXT[2500:3100], TEXT[3100:]
SEQ_LEN = 32


@pytest.fixture
def parts(tmp_path):
    """Three files in a directory, and others that it hides."""
    folder = tmp_path / "texts"
    for name, content in {"a.txt": A, "b/c.txt": B, "d.txt": C}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_of(members, mode="w", **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def zst_of(content):
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2  # two frames, as pzstd writes them
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:half]) + compress(content[half:])


def prepared(files, out, **options):
    expected = options.pop("expected", None)
    return prepare(Source(tuple(files), **options), out, SEQ_LEN, expected)


def content_of(corpus):
    return corpus.store.read(0, len(corpus.store)).tobytes()


# the files that arguments name


def test_directories_and_patterns_are_sorted(parts):
    names = lambda *given: [path.relative_to(parts).as_posix() for path in expand(given, "--data")]
    assert names(parts) == ["a.txt", "b/c.txt", "d.txt"]
    assert names(parts / "*.txt") == ["a.txt", "d.txt"]
    assert names(parts / "**" / "*.txt") == ["a.txt", "b/c.txt", "d.txt"]
    assert names(parts / "d.txt", parts / "b") == ["d.txt", "b/c.txt"]
    (parts / "[x].txt").write_bytes(A)  # a file of this name, before it is a pattern
    assert names(parts / "[x].txt") == ["[x].txt"]


def test_hidden_files_are_left_out_and_told(parts):
    (parts / ".git").mkdir()
    (parts / ".git" / "config").write_bytes(A)
    (parts / ".hidden").write_bytes(A)
    with pytest.warns(UserWarning, match="--data .*texts: hidden files are left out: 2"):
        assert len(expand([parts], "--data")) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expand([parts / ".hidden"], "--data") == [parts / ".hidden"]  # it was named


@pytest.mark.parametrize(
    "change, given, message",
    [
        (lambda f: None, ["none.txt"], "--data .*none.txt: no such file"),
        (lambda f: None, ["*.md"], r"--data .*\*.md: matches no file"),
        (lambda f: (f / "empty").mkdir(), ["empty"], "--data .*empty: no file in it"),
        (lambda f: os.mkfifo(f / "b" / "pipe"), ["b"], "--data .*pipe: not a file"),
        (lambda f: os.symlink("x", f / "b" / "link"), ["b"], "--data .*link: no such file"),
        (lambda f: None, [".", "a.txt"], "--data .*a.txt: is named twice"),
    ],
)
def test_names_that_stand_for_no_file(parts, change, given, message):
    change(parts)
    with pytest.raises(TrainError, match=message):
        expand([parts / name for name in given], "--data")


def test_unreadable_file_is_named(parts, monkeypatch):
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != parts / "d.txt" and access(path, mode)
    )
    with pytest.raises(TrainError, match="--data .*d.txt: not readable"):
        expand([parts], "--data")


# the content of files


@pytest.mark.parametrize("separator", [b"", b"\0", b"<end>\n\n"])
def test_files_are_read_where_they_lie(parts, out, separator):
    corpus = prepared([parts], out, separator=separator)
    whole = separator.join([A, B, C])
    assert content_of(corpus) == whole and list(out.iterdir()) == []
    assert corpus.identity == {"bytes": len(whole), "sha256": sha256(whole).hexdigest()}
    assert corpus.train[:].tobytes() + corpus.val[:].tobytes() == whole
    for start, stop in itertools.combinations(range(2480, 3130, 13), 2):  # over both boundaries
        assert corpus.store.read(start, stop - start).tobytes() == whole[start:stop]
    again = pickle.loads(pickle.dumps(corpus))
    assert (again.batch(1, 2, 12) == corpus.batch(1, 2, 12)).all()


PACKED = {
    "text.tar": lambda members: tar_of(members),
    "text.tar.gz": lambda members: tar_of(members, "w:gz"),
    "text.tgz": lambda members: tar_of(members, "w:gz"),
    "text.tar.bz2": lambda members: tar_of(members, "w:bz2"),
    "text.txz": lambda members: tar_of(members, "w:xz"),
    "text.tar.zst": lambda members: zst_of(tar_of(members)),
    "pax.tar": lambda members: tar_of(members, format=tarfile.PAX_FORMAT),
    "text.zip": zip_of,
}


@pytest.mark.parametrize("name", PACKED)
def test_members_are_documents(tmp_path, out, name):
    """They stand in the order of the archive, without the hidden ones."""
    (tmp_path / name).write_bytes(PACKED[name]({"z": A, ".x/y": b"hidden", "b": B, "c/d": b""}))
    with pytest.warns(UserWarning, match=f"{name}: hidden files are left out: 1"):
        corpus = prepared([tmp_path / name], out, separator=b"|")
    assert content_of(corpus) == A + b"|" + B + b"|"
    assert [path.name for path in out.iterdir()] == ["data.bin"]


@pytest.mark.parametrize(
    "name, pack",
    [("x.gz", gzip.compress), ("x.bz2", bz2.compress), ("x.xz", lzma.compress), ("x.zst", zst_of)],
)
def test_packed_and_plain_files_become_one(parts, tmp_path, out, name, pack):
    (tmp_path / name).write_bytes(pack(TEXT))
    corpus = prepared([parts / "a.txt", tmp_path / name, parts / "b"], out, separator=b"\n")
    assert content_of(corpus) == b"\n".join([A, TEXT, B])
    assert corpus.store.paths == [out / "data.bin"]
    (out / "data.bin").write_bytes(b"")
    with pytest.raises(DataChanged, match="--data .*run/data.bin: the bytes changed"):
        corpus.check()
    corpus = prepared([parts / "a.txt", tmp_path / name, parts / "b"], out, separator=b"\n")
    (tmp_path / name).unlink()  # what was unpacked is enough
    again = prepared([tmp_path / name], out, expected=corpus.identity)
    assert again.identity == corpus.identity


def test_many_files_become_one(parts, out, monkeypatch):
    monkeypatch.setattr("shtx.train.data.MAX_OPEN", 2)
    corpus = prepared([parts], out, separator=b"\n")
    assert content_of(corpus) == b"\n".join([A, B, C])
    assert corpus.store.paths == [out / "data.bin"]


def cut(content, at):
    return content[:at]


HEADER = bytearray(tar_of({"a": A, "b": B}))
HEADER[512 + 2560 + 3] ^= 1  # in the second member's name


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("x.tar", lambda: cut(tar_of({"a": A, "b": B}), 2000), "corrupt .tar file: "),
        ("x.tar", lambda: cut(tar_of({"a": A, "b": B}), 3072), "corrupt .tar file: a header"),
        ("x.tar", lambda: bytes(HEADER), "corrupt .tar file: a header is damaged"),
        ("x.tar.gz", lambda: cut(tar_of({"a": A}, "w:gz"), -9), "corrupt .gz file: "),
        ("x.tar", lambda: b"", "corrupt .tar file: "),
        ("x.tar", lambda: TEXT, "corrupt .tar file: "),
        ("x.tar", lambda: tar_of({}), "has no members that are files"),
        ("x.tar", lambda: tar_of({"a": A, "b": gzip.compress(B)}), "unpacked, it is gz"),
        ("x.zip", lambda: zip_of({"a": A, "b": tar_of({"c": B})}), "unpacked, it is tar"),
        ("x.zst", lambda: cut(zst_of(TEXT), -3), "corrupt .zst file: ends before"),
        ("x.zst", lambda: zst_of(TEXT)[:2000] + bytes(50), "corrupt .zst file: "),
        ("x.zst", lambda: zst_of(TEXT)[:0] + TEXT, "corrupt .zst file: "),
    ],
)
def test_damaged_archives(tmp_path, out, name, make, message):
    (tmp_path / name).write_bytes(make())
    with pytest.raises(TrainError, match=f"--data {tmp_path / name}: {message}") as raised:
        prepared([tmp_path / name], out)
    assert "\n" not in str(raised.value) and list(out.iterdir()) == []


def test_zst_names_its_extra(tmp_path, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / "x").write_bytes(b"\x28\xb5\x2f\xfd" + A)
    with pytest.raises(TrainError, match=r'takes Python 3.14 or pip install "shtx\[zstd\]"'):
        prepared([tmp_path / "x"], out)


def test_zst_of_pythons_own(tmp_path, out, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    own = SimpleNamespace(
        ZstdDecompressor=lambda: zstandard.ZstdDecompressor().decompressobj(),
        ZstdError=zstandard.ZstdError,
    )
    monkeypatch.setitem(sys.modules, "compression", SimpleNamespace(zstd=own))
    (tmp_path / "x.zst").write_bytes(zst_of(TEXT))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert content_of(prepared([tmp_path / "x.zst"], out)) == TEXT


def test_any_file_that_changes_is_found(parts, out):
    corpus = prepared([parts], out)
    whole = content_of(corpus)
    os.utime(parts / "b" / "c.txt", (0, 0))
    assert content_of(corpus) == whole
    (parts / "b" / "c.txt").write_bytes(B[:-1] + b"!")
    corpus.store.read(0, 100)  # this is in another file
    with pytest.raises(DataChanged, match="c.txt: the bytes changed while the run went on"):
        corpus.store.read(2400, 200)
    with pytest.raises(DataChanged):
        corpus.check()


def test_order_of_batches_is_that_of_one_process(parts, out):
    """The number of processes makes no difference, nor whether files are several or one."""
    corpus = prepared([parts], out, separator=b"\0\n")
    (parts / "whole").write_bytes(b"\0\n".join([A, B, C]))
    one = Corpus(Store([parts / "whole"]), SEQ_LEN)
    for seed, step in itertools.product((0, 7), (0, 1, 1000)):
        expected = one.batch(seed, step, 12)
        for world in (1, 2, 3, 4):
            for _ in range(2):  # and whatever was drawn before
                ranks = [pickle.loads(pickle.dumps(corpus)) for _ in range(world)]
                shares = [c.batch(seed, step, 12, rank, world) for rank, c in enumerate(ranks)]
                assert (np.concatenate(shares) == expected).all()
    assert (corpus.windows(9) == one.windows(9)).all()


# the parts for training, validation and test


def test_split_is_enwik8s():
    assert split_sizes(100_000_000, (0.9, 0.05, 0.05)) == [90_000_000, 5_000_000, 5_000_000]
    assert split_sizes(1000, SPLIT) == [900, 100]
    for size in (0, 9, 10, 4999, 123_456_789):
        assert split_sizes(size, (0.9, 0.1)) == [size - size // 10, size // 10]


def test_three_parts_in_the_order_of_the_file(parts, out):
    corpus = prepared([parts], out, split=(0.8, 0.15, 0.05))
    assert [len(part) for part in (corpus.train, corpus.val, corpus.test)] == [4800, 900, 300]
    assert corpus.train[:].tobytes() + corpus.val[:].tobytes() + corpus.test[:].tobytes() == TEXT


def test_other_files_for_validation_and_test(parts, tmp_path, out):
    (tmp_path / "test.gz").write_bytes(gzip.compress(C))
    options = dict(val=(parts / "b",), test=(tmp_path / "test.gz",))
    corpus = prepared([parts / "a.txt"], out, **options)
    assert [part[:].tobytes() for part in (corpus.train, corpus.val, corpus.test)] == [A, B, C]
    assert [path.name for path in out.iterdir()] == ["test.bin"]
    assert corpus.identity["val"] == {"bytes": len(B), "sha256": sha256(B).hexdigest()}
    (parts / "b" / "c.txt").write_bytes(B[::-1])
    with pytest.raises(TrainError, match="^--val-data: the bytes changed since the run began"):
        prepared([parts / "a.txt"], out, **options, expected=corpus.identity)
    with pytest.raises(
        TrainError, match=r"^--val-data: 600 bytes .* at least seq_len \+ 1 = 1,001"
    ):
        prepare(Source((parts / "a.txt",), **options), out, 1000)
    corpus = prepared([parts / "a.txt"], out, test=options["test"])
    assert len(corpus.val) == len(A) // 10 and corpus.test[:].tobytes() == C


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--split", "0.9"], "--split must be 2 or 3 positive shares that add up to 1, got 0.9"),
        (["--split", "0.9", "0.2"], "--split must be 2 or 3 .* got 0.9 0.2"),
        (["--split", "1", "0"], "--split must be 2 or 3 .* got 1.0 0.0"),
        (["--split", "0.4", "0.3", "0.2", "0.1"], "--split must be 2 or 3"),
        (["--split", "nan", "0.1"], "--split must be 2 or 3"),
        (["--split", "0.9", "0.1", "--val-data", "x"], "--val-data takes the place of a part"),
        (["--split", ".8", ".1", ".1", "--test-data", "x"], "third share and --test-data are both"),
        (["--separator", r"\q"], r"--separator '\\\\q': \\q is none of \\n, "),
        (["--separator", "\\"], r"--separator .* is none of \\n, "),
        (["--separator", r"\x1"], r"--separator .* \\x is none of \\n, "),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(TrainError, match=message):
        parse(["--preset", "cpu", *arguments])


def test_separator_in_escapes():
    assert unescape(r"\n\n") == b"\n\n" and unescape(r"\0") == b"\0" and unescape("") == b""
    assert unescape(r"<\\n>\xff\t") == b"<\\n>\xff\t" and unescape("é") == "é".encode()


def test_preset_of_enwik8():
    config, _ = parse(["--preset", "enwik8"])
    assert split_sizes(100_000_000, config.split) == [90_000_000, 5_000_000, 5_000_000]
    with torch.device("meta"):
        model = config.model.kind(**config.model.arguments())
    assert 38e6 < sum(p.numel() for p in model.parameters()) < 42e6
    refuse_untrainable(model)
    passes = config.steps * config.batch_size * config.model.seq_len / 90e6
    assert 20 < passes < 25
    assert Config.from_json(json.loads(json.dumps(config.to_json()))).split == config.split


# a run


def test_a_run_of_several_files(tmp_path, capsys):
    """It goes on from its files; `eval` scores the test part that training has never read."""
    text = write_text(tmp_path / "whole").read_bytes()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "1.txt").write_bytes(text[:20000])
    (folder / "2.gz").write_bytes(gzip.compress(text[20000:]))
    split = ("--split", "0.8", "0.1", "0.1")
    assert train(folder, tmp_path / "run", *split) == 0
    assert train(tmp_path / "whole", tmp_path / "one", *split) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "one")
    weights = [load(tmp_path / name).weights for name in ("run", "one")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    folder.rename(tmp_path / "gone")
    assert resume(tmp_path / "run", "--steps", "13") == 0  # from what was unpacked
    assert resume(tmp_path / "run", "--steps", "14", "--data", str(tmp_path / "whole")) == 0
    capsys.readouterr()
    assert resume(tmp_path / "run", "--steps", "15", "--split", "0.9", "0.1") == 1
    assert "--split (0.9, 0.1) is not the run's (0.8, 0.1, 0.1)" in capsys.readouterr().err
    whole = str(tmp_path / "whole")
    assert resume(tmp_path / "one", "--steps", "15", "--split", "None", "--val-data", whole) == 1
    assert "--val-data: the run has none: resuming keeps it" in capsys.readouterr().err

    def figures(*arguments):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        run = ("--checkpoint", str(tmp_path / "run"), "--out", str(file))
        assert main(["eval", *run, *arguments]) == 0
        return json.loads(file.read_text())

    (tmp_path / "test").write_bytes(text[-(len(text) // 10) :])
    of_run, of_file = figures("--split", "test"), figures("--data", str(tmp_path / "test"))
    assert of_run["bits"] == of_file["bits"] and of_run["bytes"] == len(text) // 10
    assert of_run["part"] == "test"
    assert figures("--split", "val")["bits"] != of_run["bits"]


def test_training_never_reads_the_test_part(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text")
    size, read, seen = text.stat().st_size, Part.__getitem__, []

    def spy(part, where):
        start, stop, _ = where.indices(len(part))
        seen.append((part.start + start, part.start + stop))
        return read(part, where)

    monkeypatch.setattr(Part, "__getitem__", spy)
    assert train(text, tmp_path / "run", "--split", "0.8", "0.1", "0.1") == 0
    assert size - 2 * (size // 10) < max(stop for _, stop in seen) <= size - size // 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --data FILE or --split tells what to score, got neither"),
        (["--data", "x", "--split", "val"], "either --data .* got both"),
        (["--split", "val", "--raw"], "--raw is of --data, and --split val takes its place"),
        (["--split", "val", "--part", "training"], "--part training is of --data"),
        (["--split", "test"], "--split test: the run has set no test data aside"),
    ],
)
def test_what_eval_scores(run, capsys, arguments, message):
    assert main(["eval", "--checkpoint", str(run), *arguments]) == 1
    assert message.replace(".*", "").split()[0] in (err := capsys.readouterr().err)
    assert re.search(message, err)


def test_run_of_an_older_version_goes_on(text, tmp_path):
    """One whose settings have a single path, and nothing of what came later."""
    out = tmp_path / "run"
    assert train(text, out, "--steps", "4", "--schedule", "constant") == 0

    def age(config):
        config["run"]["data"] = str(text)
        for name in ("separator", "split", "val_data", "test_data"):
            del config["run"][name]

    for step in find_steps(out / "checkpoints"):
        change_config(step, age)
        assert set(json.loads((step / "config.json").read_text())["data"]) == {"bytes", "sha256"}
    assert resume(out, "--steps", "6") == 0
    assert load(out).step == 6
    assert load(out).config["run"]["data"] == [str(text)]
