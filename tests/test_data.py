import bz2
import gzip
import io
import lzma
import os
import sysconfig
import tarfile
import zipfile

import numpy as np
import pytest
from helpers import flipped

from shtx.train import TrainError
from shtx.train.data import Corpus, Source, prepare
from shtx.train.sources import packing
from shtx.train.store import Store

TEXT = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
SEQ_LEN = 32


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def path_of(corpus):
    (path,) = corpus.store.paths
    return path


def write(path, content):
    """`content` in the form that the suffix of `path` names."""
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("member", content)
    elif path.suffix.lower() in (".bz2", ".xz"):
        path.write_bytes({".bz2": bz2, ".xz": lzma}[path.suffix].compress(content))
    else:
        path.write_bytes(content)
    return path


def test_last_tenth_is_for_validation(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    assert corpus.train[:].tobytes() == TEXT[:4500] and len(corpus.train) == 4500
    assert corpus.val[:].tobytes() == TEXT[4500:] and len(corpus.val) == 500
    assert corpus.val[7:19].tobytes() == TEXT[4507:4519]


def test_batch_is_pieces_of_the_training_part(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    batch = corpus.batch(seed=0, step=0, size=500)
    assert batch.shape == (500, SEQ_LEN + 1)
    starts = [TEXT.find(row.tobytes()) for row in batch]
    assert min(starts) >= 0 and max(starts) <= 4500 - SEQ_LEN - 1
    assert max(starts) - min(starts) > 4000
    assert len(set(starts)) > 400


def test_data_order_never_changes(raw):
    """A resumed run continues the order of the version it began with."""
    batch = Corpus(Store([raw]), SEQ_LEN).batch(seed=7, step=123, size=4)
    assert [TEXT.find(row.tobytes()) for row in batch] == [3334, 2614, 1255, 3720]


def test_batch_depends_on_seed_and_step_alone(raw):
    one, other = Corpus(Store([raw]), SEQ_LEN), Corpus(Store([raw]), SEQ_LEN)
    other.batch(0, 5, 8)
    assert (one.batch(3, 4, 8) == other.batch(3, 4, 8)).all()
    assert (one.batch(3, 4, 8) != one.batch(3, 5, 8)).any()
    assert (one.batch(3, 4, 8) != one.batch(4, 4, 8)).any()


def test_shares_of_the_ranks_are_the_batch_of_one(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    shares = [corpus.batch(0, 9, 12, rank, world=3) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert (np.concatenate(shares) == corpus.batch(0, 9, 12)).all()


def test_windows_span_the_validation_part(raw):
    windows = Corpus(Store([raw]), SEQ_LEN).windows(5)
    starts = [TEXT.find(row.tobytes()) - 4500 for row in windows]
    assert starts == [0, 116, 233, 350, 467]  # the last one ends with the data: 467 + 33 = 500


def test_most_different_windows_begin_at_every_byte(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    most = corpus.different_windows
    expected = [TEXT[start : start + SEQ_LEN + 1] for start in range(4500, 5000 - SEQ_LEN)]
    assert [window.tobytes() for window in corpus.windows(most)] == expected


@pytest.mark.parametrize("name", ["text.gz", "text.zip", "TEXT.GZ", "text.bz2", "text.xz"])
def test_packed_is_the_same_as_raw(tmp_path, out, name):
    corpus = prepare(Source((write(tmp_path / name, TEXT),)), out, SEQ_LEN)
    assert path_of(corpus) == out / "data.bin"
    assert path_of(corpus).read_bytes() == TEXT
    assert [path.name for path in out.iterdir()] == ["data.bin"]


def test_raw_stays_in_place(raw, out):
    assert path_of(prepare(Source((raw,)), out, SEQ_LEN)) == raw
    assert list(out.iterdir()) == []


def test_default_is_the_standard_library(tmp_path, out, monkeypatch):
    library = tmp_path / "library"
    for name in ("b.py", "a/z.py", "a.py", "site-packages/x.py", "a/dist-packages/x.py", "c.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(name.encode() * 100)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    corpus = prepare(Source(), out, SEQ_LEN)
    assert path_of(corpus).read_bytes() == b"a.py" * 100 + b"a/z.py" * 100 + b"b.py" * 100


def test_no_library_sources(tmp_path, out, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "none")}.__getitem__)
    with pytest.raises(TrainError, match="no library sources under .*: give --data FILE"):
        prepare(Source(), out, SEQ_LEN)
    assert list(out.iterdir()) == []


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def no_members(path):
    zipfile.ZipFile(path, "w").close()


def lzma_in_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("member", TEXT)
    content = bytearray(path.read_bytes())
    content[100:300] = bytes(200)
    path.write_bytes(content)


def encrypted(path):
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + offset] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("text.gz", truncated, "corrupt .gz file: "),
        ("text.gz", flipped, "corrupt .gz file: "),
        ("text.gz", lambda path: path.write_bytes(TEXT), "corrupt .gz file: Not a gzipped file"),
        ("text.gz", lambda path: path.write_bytes(b""), "0 bytes are too few"),
        ("text.zip", truncated, "corrupt .zip file: "),
        ("text.zip", flipped, "corrupt .zip file: "),
        ("text.zip", lambda path: path.write_bytes(b""), "corrupt .zip file: "),
        ("text.bz2", truncated, "corrupt .bz2 file: "),
        ("text.bz2", flipped, "corrupt .bz2 file: "),
        ("text.xz", truncated, "corrupt .xz file: "),
        ("text.xz", flipped, "corrupt .xz file: "),
        ("text.zip", lambda path: lzma_in_zip(path), "corrupt .zip file: "),
        ("text.zip", no_members, "has no members that are files"),
        ("text.zip", encrypted, "cannot be unpacked: .*encrypted"),
        ("text", lambda path: path.unlink(), "text: no such file"),
        ("text", lambda path: path.unlink() or path.mkdir(), "text: no file in it"),
        ("text", lambda path: path.unlink() or os.mkfifo(path), "text: not a file"),
        ("text", lambda path: path.write_bytes(b""), "0 bytes are too few"),
        ("text", lambda path: write(path, TEXT[:329]), r"329 bytes .* seq_len \+ 1 = 33"),
        ("text.gz", lambda path: write(path, TEXT[:329]), r"329 bytes .* seq_len \+ 1 = 33"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, out, name, damage, message):
    path = write(tmp_path / name, TEXT)
    damage(path)
    with pytest.raises(TrainError, match=message) as raised:
        prepare(Source((path,)), out, SEQ_LEN)
    assert "--data" in str(raised.value) and "\n" not in str(raised.value)
    assert list(out.iterdir()) == []


def test_shortest_corpus(tmp_path):
    corpus = Corpus(Store([write(tmp_path / "text", TEXT[:330])]), SEQ_LEN)
    assert corpus.windows(3).shape == (3, 33)
    assert corpus.batch(0, 0, 2).shape == (2, 33)


@pytest.mark.parametrize("name", ["text", "text.gz", "text.zip"])
def test_changed_data_is_refused(tmp_path, out, name):
    path = write(tmp_path / name, TEXT)
    identity = prepare(Source((path,)), out, SEQ_LEN).identity
    assert prepare(Source((path,)), out, SEQ_LEN, expected=identity).identity == identity
    write(path, TEXT[:-1] + b"!")
    with pytest.raises(TrainError, match="the bytes changed since the run began: then 5,000 with"):
        prepare(Source((path,)), out, SEQ_LEN, expected=identity)
    if name != "text":
        assert [path.name for path in out.iterdir()] == ["data.bin"]
        assert (out / "data.bin").read_bytes() == TEXT


def test_moved_data_is_taken(tmp_path, out, raw):
    identity = prepare(Source((write(tmp_path / "text.gz", TEXT),)), out, SEQ_LEN).identity
    assert path_of(prepare(Source((raw,)), out, SEQ_LEN, expected=identity)) == raw


def test_run_keeps_its_copy_of_the_standard_library(tmp_path, out, monkeypatch):
    (tmp_path / "a.py").write_bytes(TEXT)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    identity = prepare(Source(), out, SEQ_LEN).identity
    (tmp_path / "a.py").write_bytes(TEXT * 2)
    assert path_of(prepare(Source(), out, SEQ_LEN, expected=identity)) == out / "data.bin"
    (out / "data.bin").write_bytes(TEXT * 2)
    with pytest.raises(TrainError, match="the bytes changed"):
        prepare(Source(), out, SEQ_LEN, expected=identity)


@pytest.mark.parametrize("kind", ["gz", "zip", "bz2", "xz"])
def test_first_bytes_tell_what_is_packed(tmp_path, out, kind):
    write(tmp_path / f"text.{kind}", TEXT).rename(tmp_path / "text")
    assert path_of(prepare(Source((tmp_path / "text",)), out, SEQ_LEN)).read_bytes() == TEXT
    corpus = prepare(Source((tmp_path / "text",), raw=True), out, SEQ_LEN)
    assert path_of(corpus) == tmp_path / "text"
    # a run of an older version, which trained on it as it was
    again = prepare(Source((path_of(corpus),)), out, SEQ_LEN, expected=corpus.identity)
    assert path_of(again) == path_of(corpus)


def test_blocks_of_bz2_are_of_any_size():
    assert {packing(bz2.compress(TEXT, level)) for level in range(1, 10)} == {"bz2"}


def tar_of(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("member")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def npy_of(content):
    file = io.BytesIO()
    np.save(file, np.frombuffer(content, np.uint8))
    return file.getvalue()


NOISE = {
    "text.npy": (npy_of, "a NumPy array: write what is in it to a file of plain bytes"),
    "text.zip": (gzip.compress, "unpacked, it is gz: give a file of plain bytes"),
    "text.7z": (b"7z\xbc\xaf\x27\x1c".__add__, "a 7z archive: "),
    "text.parquet": (b"PAR1".__add__, "a Parquet file: "),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_refused(tmp_path, out, name):
    content_of, message = NOISE[name]
    path = write(tmp_path / name, content_of(TEXT))
    with pytest.raises(TrainError, match=f"--data {path}: {message}"):
        prepare(Source((path,)), out, SEQ_LEN)
    assert list(out.iterdir()) == []
    assert path_of(prepare(Source((path,), raw=True), out, SEQ_LEN)) == path


def test_data_that_changes_meanwhile(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    batch = corpus.batch(0, 0, 4)
    os.utime(raw, (0, 0))
    assert (corpus.batch(0, 0, 4) == batch).all()
    raw.rename(raw.with_name("moved"))
    raw.write_bytes(b"another file of the same name")
    assert (corpus.batch(0, 0, 4) == batch).all()
    for change in (TEXT[:-1], TEXT[:-1] + b"!", b""):  # truncated, written over, gone
        raw.with_name("moved").write_bytes(change)
        with pytest.raises(TrainError, match="text: the bytes changed while the run went on"):
            corpus.batch(0, 0, 4)


def test_data_of_the_first_process(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    assert Store([raw], identity=corpus.identity).identity == corpus.identity
    raw.write_bytes(TEXT[:-1])
    with pytest.raises(TrainError, match="text: the bytes changed while the run went on"):
        Store([raw], identity=corpus.identity)


def test_copy_that_was_unpacked_is_enough(tmp_path, out):
    archive = write(tmp_path / "text.gz", TEXT)
    identity = prepare(Source((archive,)), out, SEQ_LEN).identity
    archive.unlink()
    assert path_of(prepare(Source((archive,)), out, SEQ_LEN, expected=identity)) == out / "data.bin"
    other = tmp_path / "other"
    other.mkdir()
    corpus = prepare(Source((archive,)), other, SEQ_LEN, expected=identity, former=out)
    assert path_of(corpus) == other / "data.bin" and path_of(corpus).read_bytes() == TEXT
    (out / "data.bin").write_bytes(TEXT[:-1] + b"!")
    with pytest.raises(TrainError, match="the bytes changed since the run began"):
        prepare(Source((archive,)), out, SEQ_LEN, expected=identity)


def test_some_windows_are_those_of_all(raw):
    corpus = Corpus(Store([raw]), SEQ_LEN)
    assert (corpus.windows(100, slice(13, 20)) == corpus.windows(100)[13:20]).all()
