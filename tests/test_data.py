import gzip
import sysconfig
import zipfile

import numpy as np
import pytest

from shtx.train import TrainError
from shtx.train.data import Corpus, prepare

TEXT = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
SEQ_LEN = 32


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def write(path, content):
    """`content` in the form that the suffix of `path` names."""
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("member", content)
    else:
        path.write_bytes(content)
    return path


def test_last_tenth_is_for_validation(raw):
    corpus = Corpus(raw, SEQ_LEN)
    assert corpus.train.tobytes() == TEXT[:4500]
    assert corpus.val.tobytes() == TEXT[4500:]
    assert isinstance(corpus.train, np.memmap)


def test_batch_is_pieces_of_the_training_part(raw):
    corpus = Corpus(raw, SEQ_LEN)
    batch = corpus.batch(seed=0, step=0, size=500)
    assert batch.shape == (500, SEQ_LEN + 1)
    starts = [TEXT.find(row.tobytes()) for row in batch]
    assert min(starts) >= 0 and max(starts) <= 4500 - SEQ_LEN - 1
    assert max(starts) - min(starts) > 4000
    assert len(set(starts)) > 400


def test_data_order_never_changes(raw):
    """A resumed run continues the order of the version it began with."""
    batch = Corpus(raw, SEQ_LEN).batch(seed=7, step=123, size=4)
    assert [TEXT.find(row.tobytes()) for row in batch] == [3334, 2614, 1255, 3720]


def test_batch_depends_on_seed_and_step_alone(raw):
    one, other = Corpus(raw, SEQ_LEN), Corpus(raw, SEQ_LEN)
    other.batch(0, 5, 8)
    assert (one.batch(3, 4, 8) == other.batch(3, 4, 8)).all()
    assert (one.batch(3, 4, 8) != one.batch(3, 5, 8)).any()
    assert (one.batch(3, 4, 8) != one.batch(4, 4, 8)).any()


def test_shares_of_the_ranks_are_the_batch_of_one(raw):
    corpus = Corpus(raw, SEQ_LEN)
    shares = [corpus.batch(0, 9, 12, rank, world=3) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert (np.concatenate(shares) == corpus.batch(0, 9, 12)).all()


def test_windows_span_the_validation_part(raw):
    windows = Corpus(raw, SEQ_LEN).windows(5)
    starts = [TEXT.find(row.tobytes()) - 4500 for row in windows]
    assert starts == [0, 116, 233, 350, 467]  # the last one ends with the data: 467 + 33 = 500


@pytest.mark.parametrize("name", ["text.gz", "text.zip", "TEXT.GZ"])
def test_packed_is_the_same_as_raw(tmp_path, out, name):
    corpus = prepare(write(tmp_path / name, TEXT), out, SEQ_LEN)
    assert corpus.path == out / "data.bin"
    assert corpus.path.read_bytes() == TEXT
    assert [path.name for path in out.iterdir()] == ["data.bin"]


def test_raw_stays_in_place(raw, out):
    assert prepare(raw, out, SEQ_LEN).path == raw
    assert list(out.iterdir()) == []


def test_default_is_the_standard_library(tmp_path, out, monkeypatch):
    library = tmp_path / "library"
    for name in ("b.py", "a/z.py", "a.py", "site-packages/x.py", "a/dist-packages/x.py", "c.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(name.encode() * 100)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    corpus = prepare(None, out, SEQ_LEN)
    assert corpus.path.read_bytes() == b"a.py" * 100 + b"a/z.py" * 100 + b"b.py" * 100


def test_no_library_sources(tmp_path, out, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "none")}.__getitem__)
    with pytest.raises(TrainError, match="no library sources under .*: give --data FILE"):
        prepare(None, out, SEQ_LEN)
    assert list(out.iterdir()) == []


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def two_members(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other", b"")


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
        ("text.zip", two_members, "must have one member, got 2"),
        ("text.zip", encrypted, "cannot be unpacked: .*encrypted"),
        ("text", lambda path: path.unlink(), "text: no such file"),
        ("text", lambda path: path.unlink() or path.mkdir(), "text: not a file"),
        ("text", lambda path: path.write_bytes(b""), "0 bytes are too few"),
        ("text", lambda path: write(path, TEXT[:329]), r"329 bytes .* seq_len \+ 1 = 33"),
        ("text.gz", lambda path: write(path, TEXT[:329]), r"329 bytes .* seq_len \+ 1 = 33"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, out, name, damage, message):
    path = write(tmp_path / name, TEXT)
    damage(path)
    with pytest.raises(TrainError, match=message) as raised:
        prepare(path, out, SEQ_LEN)
    assert "--data" in str(raised.value) and "\n" not in str(raised.value)
    assert list(out.iterdir()) == []


def test_shortest_corpus(tmp_path):
    corpus = Corpus(write(tmp_path / "text", TEXT[:330]), SEQ_LEN)
    assert corpus.windows(3).shape == (3, 33)
    assert corpus.batch(0, 0, 2).shape == (2, 33)


@pytest.mark.parametrize("name", ["text", "text.gz", "text.zip"])
def test_changed_data_is_refused(tmp_path, out, name):
    path = write(tmp_path / name, TEXT)
    identity = prepare(path, out, SEQ_LEN).identity
    assert prepare(path, out, SEQ_LEN, expected=identity).identity == identity
    write(path, TEXT[:-1] + b"!")
    with pytest.raises(TrainError, match="the bytes changed since the run began: then 5,000 with"):
        prepare(path, out, SEQ_LEN, expected=identity)
    if name != "text":
        assert [path.name for path in out.iterdir()] == ["data.bin"]
        assert (out / "data.bin").read_bytes() == TEXT


def test_moved_data_is_taken(tmp_path, out, raw):
    identity = prepare(write(tmp_path / "text.gz", TEXT), out, SEQ_LEN).identity
    assert prepare(raw, out, SEQ_LEN, expected=identity).path == raw


def test_run_keeps_its_copy_of_the_standard_library(tmp_path, out, monkeypatch):
    (tmp_path / "a.py").write_bytes(TEXT)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    identity = prepare(None, out, SEQ_LEN).identity
    (tmp_path / "a.py").write_bytes(TEXT * 2)
    assert prepare(None, out, SEQ_LEN, expected=identity).path == out / "data.bin"
    (out / "data.bin").write_bytes(TEXT * 2)
    with pytest.raises(TrainError, match="the bytes changed"):
        prepare(None, out, SEQ_LEN, expected=identity)
