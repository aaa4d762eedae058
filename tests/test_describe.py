"""`shtx data` and `shtx data prepare`."""

import gzip
import json
import math
import re
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from running import TINY, write_text

from shtx.cli import main
from shtx.train import TrainError, visible
from shtx.train.arguments import parse
from shtx.train.describe import Documents
from shtx.train.encode import decoded, pieces_of
from shtx.train.metrics import read

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def book(tmp_path):
    return write_text(tmp_path / "text")


def described(capsys, *arguments):
    assert main(["data", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def entropy(content, order):
    """Compute it by the definition: from the counts of contexts and of what follows them."""
    grams = Counter(content[i : i + order + 1] for i in range(len(content) - order))
    contexts = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    total = sum(grams.values())
    return -sum(n / total * math.log2(n / contexts[gram[:-1]]) for gram, n in grams.items())


@pytest.mark.parametrize("chunk", [1 << 24, 1000, 1])
def test_entropy(book, tmp_path, monkeypatch, capsys, chunk):
    """The pieces that a stream is cut into make no difference."""
    monkeypatch.setattr("shtx.train.sources.BLOCK", 700)
    monkeypatch.setattr("shtx.train.describe.CHUNK", chunk)
    content = book.read_bytes()[:3000] + bytes(np.random.default_rng(0).bytes(2000))
    (tmp_path / "mixed").write_bytes(content)
    figures = described(capsys, tmp_path / "mixed")
    expected = [entropy(content, order) for order in range(4)]
    np.testing.assert_allclose(figures["entropy_bits_per_byte"], expected, rtol=1e-12)
    assert figures["entropy_bytes"] == [5000, 4999, 4998, 4997]


def test_grams_are_bounded(book, tmp_path, monkeypatch, capsys):
    """It says over which bytes an order was counted."""
    monkeypatch.setattr("shtx.train.describe.MOST_GRAMS", 500)
    monkeypatch.setattr("shtx.train.describe.CHUNK", 1 << 12)
    monkeypatch.setattr("shtx.train.sources.BLOCK", 1 << 12)
    (tmp_path / "noise").write_bytes(content := np.random.default_rng(0).bytes(20_000))
    figures = described(capsys, tmp_path / "noise")
    assert figures["entropy_bytes"] == [20_000, 4095, 4094, 4093]
    assert figures["entropy_bits_per_byte"][3] == pytest.approx(entropy(content[:4096], 3))
    assert main(["data", str(tmp_path / "noise")]) == 0
    assert "bits per byte over the first 4,096 bytes" in capsys.readouterr().out


def test_of_several_files(book, tmp_path, capsys):
    (tmp_path / "packed.gz").write_bytes(gzip.compress(b"one\n\n\n\ntwo\n\n"))
    content = book.read_bytes() + b"\n\none\n\n\n\ntwo\n\n"
    arguments = book, tmp_path / "packed.gz", "--separator", r"\n\n", "--split", ".9", ".05", ".05"
    figures = described(capsys, *arguments)
    assert (figures["bytes"], figures["documents"]) == (len(content), 3)
    assert figures["sha256"] == sha256(content).hexdigest()
    assert [file["kind"] for file in figures["files"]] == ["plain", "gz"]
    assert [file["bytes"] for file in figures["files"]] == [book.stat().st_size, 12]
    part = len(content) // 20
    assert figures["split"] == {
        "train": [0, len(content) - 2 * part],
        "val": [len(content) - 2 * part, len(content) - part],
        "test": [len(content) - part, len(content)],
    }
    assert main(["data", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "gz, 12 bytes in" in out and "3 documents" in out and "entropy of order 3: " in out
    assert f"test: bytes {len(content) - part:,} to {len(content):,}" in out


@pytest.mark.parametrize("separator", [b"\0", b"ab", b"aab"])
def test_documents(separator):
    """Documents that have a byte are counted, wherever the blocks end."""
    content = np.random.default_rng(3).choice([*b"ab\0"], 400).astype(np.uint8).tobytes()
    expected = sum(map(bool, content.split(separator)))
    for size in (1, 2, 3, 7, 400):
        documents = Documents(separator)
        for i in range(0, len(content), size):
            documents.add(content[i : i + size])
        assert documents.count == expected


PREPARE = "prepare", "--tokenizer"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none"], "FILE none: no such file"),
        (["--split", "0.5", "0.6", "--", "text"], "--split must be 2 or 3 positive shares"),
        (["text", "--separator", r"\q"], r"--separator '\\\\q': \\q is none of"),
        ([*PREPARE, "x.json", "--out", "x", "text"], "--out x: must end in .bin"),
        ([*PREPARE, "x.json", "--out", "x.bin", "text"], "x.json: cannot be loaded"),
        ([*PREPARE, "x.json", "--out", "is.bin", "text"], "is.bin: is there already"),
        ([*PREPARE, "t.json", "--out", "x.bin", "latin"], r"UTF-8 text, got b'\\xe9' at byte 3"),
        ([*PREPARE, "t.json", "--out", "x.bin", "empty"], "there is no text to make tokens of"),
    ],
)
def test_bad_flags(book, tokenizer, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "is.bin").write_bytes(b"")
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    names = sorted(tmp_path.iterdir())
    assert main(["data", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == names


# tokens


@pytest.fixture
def tokenizer(book, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        book.read_text().splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<end>"],
            show_progress=False,
        ),
    )
    tokenizer.save(str(tmp_path / "t.json"))
    return tokenizer


def test_prepared_tokens(book, tokenizer, tmp_path, capsys, monkeypatch):
    """Tokens are those of the whole book, whatever the pieces; a run knows its bits per byte."""
    monkeypatch.setattr("shtx.train.encode.PIECE", 1000)
    out = tmp_path / "tokens.bin"
    content = book.read_text() + "é\n\n  x"
    book.write_text(content)
    (tmp_path / "more.gz").write_bytes(gzip.compress(book.read_bytes()))
    arguments = "--tokenizer", tmp_path / "t.json", "--separator", "<end>", "--out", out
    prepare = ["data", "prepare", book, tmp_path / "more.gz", *arguments]
    assert main(list(map(str, prepare))) == 0
    both = f"{content}<end>{content}"
    expected = tokenizer.encode(both).ids
    assert np.fromfile(out, np.uint16).tolist() == expected
    assert expected.count(tokenizer.token_to_id("<end>")) == 1
    beside = json.loads((tmp_path / "tokens.bin.json").read_text())
    assert beside == {
        "num_tokens": tokenizer.get_vocab_size(),
        "dtype": "uint16",
        "tokens": len(expected),
        "bytes": len(both.encode()),
        "bytes_per_token": len(both.encode()) / len(expected),
        "tokenizer_sha256": sha256(tokenizer.to_str().encode()).hexdigest(),
    }
    capsys.readouterr()
    figures = described(capsys, out)
    shares = np.bincount(expected) / len(expected)
    bits = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    assert figures["entropy_bits_per_token"] == pytest.approx([bits])
    assert (figures["tokens"], figures["num_tokens"]) == (len(expected), beside["num_tokens"])
    assert main(["data", str(out)]) == 0
    assert "bytes per token" in capsys.readouterr().out

    train = ["train", *TINY, "--steps", "1", "--data", str(out), "--out", str(tmp_path / "run")]
    assert main(train) == 0
    row = next(row for row in read(tmp_path / "run" / "metrics.jsonl") if "lr" in row)
    assert row["bits_per_byte"] == row["bits_per_token"] / beside["bytes_per_token"]
    capsys.readouterr()
    generate = ["generate", "--checkpoint", str(tmp_path / "run"), "--length", "8", "--seed", "0"]
    assert main([*generate, "--tokenizer", str(tmp_path / "t.json"), "--prompt", "line 5é"]) == 0
    told = capsys.readouterr().out
    ids = tokenizer.encode("line 5é").ids
    assert main([*generate, "--prompt", " ".join(map(str, ids))]) == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    written = tmp_path / "out.txt"
    command = [*generate, "--tokenizer", str(tmp_path / "t.json"), "--prompt", "line 5é"]
    assert main([*command, "--out", str(written)]) == 0
    assert written.read_text() == whole
    capsys.readouterr()
    assert told.startswith("line 5é") and visible(whole).startswith(told.rstrip("\n"))
    other = json.loads(tokenizer.to_str()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "t.json").write_text(json.dumps(other))
    assert main([*generate, "--tokenizer", str(tmp_path / "t.json"), "--prompt", "line"]) == 1
    assert "t.json: is not the one that made the tokens of the run" in capsys.readouterr().err
    assert parse(["--data", str(out)])[0].model.num_tokens == beside["num_tokens"]


def test_a_character_may_lie_in_two_blocks(tmp_path):
    assert decoded(tmp_path, b"a\xc3", 7, last=False) == ("a", b"\xc3", 8)
    assert decoded(tmp_path, b"\xc3\xa9", 8, last=False) == ("é", b"", 10)
    for content, last in ((b"a\xff\xa9", False), (b"a\xc3", True)):
        with pytest.raises(TrainError, match="must be UTF-8 text, got .* at byte 8"):
            decoded(tmp_path, content, 7, last)


def test_pieces_end_before_the_end_of_a_line(monkeypatch):
    lines = [f"word {i}.\n\n  next {i}\n" for i in range(500)]
    text = "".join(lines)
    monkeypatch.setattr("shtx.train.encode.PIECE", 100)
    pieces = list(pieces_of(text[i : i + 37] for i in range(0, len(text), 37)))
    assert list(pieces_of(iter(["x" * 5000]))) == ["x" * 5000]
    assert "".join(pieces) == text and len(pieces) > 30
    for piece in pieces[1:]:
        assert piece[0] == "\n" and text[text.index(piece) - 1].isalnum()


def test_tokenizer_of_a_run_on_bytes(run, capsys):
    command = ["generate", "--checkpoint", str(run), "--prompt", "x", "--tokenizer", "t.json"]
    assert main(command) == 1
    assert "--tokenizer t.json: the run was trained on bytes" in capsys.readouterr().err


def test_prepare_names_its_extra(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shtx.train.encode.find_spec", lambda name: None)
    arguments = ["--tokenizer", "t.json", "--out", str(tmp_path / "x.bin")]
    assert main(["data", "prepare", str(book), *arguments]) == 1
    assert 'tokenizers not installed: pip install "shtx[tokenizers]"' in capsys.readouterr().err
