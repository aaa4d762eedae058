"""Token ids as data: files of them, what is beside them, and the units of figures."""

import json
import math

import numpy as np
import pytest
import torch
from running import TINY, resume, train

from shtx.cli import main
from shtx.train import TrainError
from shtx.train.arguments import parse
from shtx.train.checkpoint import load
from shtx.train.config import settings_of
from shtx.train.data import Source, prepare
from shtx.train.metrics import read
from shtx.train.tokens import Description, Tokens
from shtx.train.warmup import noise

V = 300
IDS = np.random.default_rng(2).integers(0, V, 5000)
TOKENS = Tokens(V, "uint16")
DESCRIBED = Description(TOKENS, len(IDS), 4 * len(IDS), "a" * 64)


@pytest.fixture
def file(tmp_path):
    IDS.astype(np.uint16).tofile(path := tmp_path / "tokens.bin")
    return path


def save(path, ids):
    ids.tofile(path) if path.suffix == ".bin" else np.save(path, ids)
    return path


def prepared(path, out, tokens=TOKENS):
    return prepare(Source((path,), tokens=tokens), out, 32)


@pytest.mark.parametrize("name", ["x.bin", "x.npy"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_of_ids(tmp_path, out, name, dtype):
    """The sequences are those of bytes of the same length, and their values are the ids."""
    path = save(tmp_path / name, IDS.astype(dtype))
    corpus = prepared(path, out, Tokens(V, dtype))
    assert len(corpus.train) == 4500 and (corpus.val[:] == IDS[4500:]).all()
    (tmp_path / "bytes").write_bytes(bytes(IDS.astype(np.uint8)))
    of_bytes = prepare(Source((tmp_path / "bytes",)), out, 32)
    batch = corpus.batch(0, 3, 50)
    assert batch.dtype == np.int64 and batch.max() > 255
    assert (batch % 256 == of_bytes.batch(0, 3, 50)).all()
    assert (corpus.windows(7) % 256 == of_bytes.windows(7)).all()


def test_several_files_of_ids(tmp_path, out):
    """A directory stands for those in it; what is beside them is not data."""
    folder = tmp_path / "ids"
    folder.mkdir()
    save(folder / "1.bin", IDS[:2001].astype(np.uint16))
    save(folder / "2.npy", IDS[2001:].astype(np.uint16))
    (folder / "notes.txt").write_text("no ids")
    assert (prepared(folder, out).store.read(0, len(IDS)) == IDS).all()


def with_id(id, at):
    ids = IDS.copy()
    ids[at] = id
    return ids.astype(np.uint16)


def test_most_files_of_ids(file, out, monkeypatch):
    monkeypatch.setattr("shtx.train.data.MAX_OPEN", 0)
    with pytest.raises(TrainError, match="--data: at most 0 token files, got 1"):
        prepared(file, out)


BAD = {
    "beyond.bin": (with_id(V, 4321), "token 4,321 has id 300: ids must be in \\[0, 300\\)"),
    "beyond.npy": (with_id(999, 4999), "token 4,999 has id 999: ids must be in"),
    "odd.bin": (np.zeros(4001, np.uint8), "uint16 take a multiple of 2 bytes, got 4,001"),
    "flat.npy": (IDS.reshape(2, -1).astype(np.uint16), "one dimension, got uint16 with 2"),
    "wide.npy": (IDS, "must be an array of uint16 with one dimension, got int64 with 1"),
    "swapped.npy": (IDS.astype(">u2"), "must be an array of uint16 .* got >u2 with 1"),
    "objects.npy": (np.array([{}]), "corrupt .npy file: .*Python objects"),
    "short.bin": (IDS[:300].astype(np.uint16), r"300 tokens are too few: the 30 of them"),
    "ids.txt": (None, "a file of token ids must end in .bin or .npy"),
    "cut.npy": (None, "corrupt .npy file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, out, name):
    ids, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(b"\x93NUMPY") if ids is None else save(path, ids)
    with pytest.raises(TrainError, match=message) as raised:
        prepared(path, out)
    assert "\n" not in str(raised.value)


def test_position_beyond_the_first_block(tmp_path, out, monkeypatch):
    monkeypatch.setattr("shtx.train.store.BLOCK", 1 << 10)
    path = save(tmp_path / "x.bin", with_id(V + 5, 3333))
    with pytest.raises(TrainError, match=r"x.bin: token 3,333 has id 305"):
        prepared(path, out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-tokens", "300"], "--num-tokens 300 takes --data"),
        (
            ["--num-tokens", "0", "--data", "x.bin"],
            "--num-tokens must be 1 to 4,294,967,296, got 0",
        ),
        (
            ["--num-tokens", "70000", "--token-dtype", "uint16", "--data", "x.bin"],
            "--num-tokens must be 1 to 65,536, got 70,000",
        ),
        (["--token-dtype", "uint16", "--data", "x.bin"], "--token-dtype uint16 takes --num-tokens"),
        (["--num-tokens", "9", "--data", "x.bin", "--raw"], "--raw is for bytes"),
        (["--num-tokens", "9", "--data", "x.bin", "--separator", "x"], "--separator is for bytes"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(TrainError, match=message):
        parse(["--preset", "cpu", *arguments])


def test_what_warmup_trains_on():
    config, _ = parse(["--preset", "cpu", "--data", "x.bin", "--num-tokens", "70000"])
    corpus = noise(config)
    assert 50_000 < corpus.train[:].max() < 70_000
    config, _ = parse(["--preset", "cpu"])
    assert noise(config).train[:].dtype == np.uint8


def test_described(file, capsys):
    """A flag names the vocabulary; how many bytes a token has is not known."""
    assert main(["data", str(file), "--num-tokens", str(V)]) == 0
    out = capsys.readouterr().out
    shares = np.unique(IDS, return_counts=True)[1] / len(IDS)
    assert f"entropy of order 0: {-(shares * np.log2(shares)).sum():.4f} bits per token" in out
    assert "5,000 tokens, sha256" in out and "nobody knows how many bytes per token" in out
    assert main(["data", str(file), "--num-tokens", "299"]) == 1
    assert "has id 299: ids must be in [0, 299)" in capsys.readouterr().err


# the description beside a file


def test_what_is_beside_a_file_is_taken(file):
    DESCRIBED.write(file)
    assert Description.read(file) == DESCRIBED
    config, _ = parse(["--preset", "cpu", "--data", str(file)])
    assert (config.tokens, config.bytes_per_token) == (TOKENS, 4.0)
    assert config.model.arguments()["num_tokens"] == V
    config, _ = parse(["--preset", "cpu", "--data", str(file), "--num-tokens", str(V)])
    assert config.bytes_per_token == 4.0
    config, _ = parse(["--preset", "cpu", "--data", str(file), "--raw"])
    assert config.tokens is None


def test_large_vocabularies_take_uint32(file):
    tokens = lambda n: parse(["--data", str(file), "--num-tokens", str(n)])[0].tokens
    assert tokens(65536).dtype == "uint16" and tokens(65537).dtype == "uint32"


def test_files_of_one_tokenizer(file, tmp_path):
    other = save(tmp_path / "other.bin", IDS.astype(np.uint16))
    arguments = ["--preset", "cpu", "--data", str(file), str(other)]
    DESCRIBED.write(file)
    with pytest.raises(TrainError, match="other.bin: is not of the same tokenizer as .*tokens.bin"):
        parse(arguments)
    Description(TOKENS, len(IDS), 2 * len(IDS), "a" * 64).write(other)
    assert parse(arguments)[0].bytes_per_token == 3.0
    Description(TOKENS, len(IDS), 2 * len(IDS), "b" * 64).write(other)
    with pytest.raises(TrainError, match="other.bin: is not of the same tokenizer"):
        parse(arguments)


def test_bad_descriptions(file):
    DESCRIBED.write(file)
    with pytest.raises(TrainError, match="--num-tokens 299: the file beside --data says 300"):
        parse(["--preset", "cpu", "--data", str(file), "--num-tokens", "299"])
    beside = file.with_name("tokens.bin.json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"dtype": "int64"}))
    with pytest.raises(TrainError, match="tokens.bin.json: damaged: not what .*prepare.* wrote"):
        parse(["--preset", "cpu", "--data", str(file)])


# a run


def test_a_run_on_token_ids(file, tmp_path, capsys):
    """Figures are in bits per token, not per byte: nobody knows how many a token stands for."""
    run = tmp_path / "out"
    assert train(file, run, "--num-tokens", str(V), "--steps", "2") == 0
    out = capsys.readouterr().out
    assert "4 sequences of 32 tokens a step" in out and "0.0 million tokens to train on" in out
    assert "sample after a prompt of 32 tokens:" in out and "byte" not in out
    ids = [int(word) for word in out.split("tokens:\n")[1].split("\n")[0].split()]
    assert len(ids) == 32 + 256 and ids[:32] == IDS[4500:4532].tolist() and max(ids) < V
    figures = [row for row in read(run / "metrics.jsonl") if "val_bits_per_token" in row]
    assert figures[0]["val_bits_per_token"] == pytest.approx(math.log2(V), rel=0.1)
    assert not any("byte" in name for row in read(run / "metrics.jsonl") for name in row)
    assert (run / "loss.png").exists()
    checkpoint = load(run)
    assert checkpoint.weights["token_emb.weight"].shape[0] == V
    assert settings_of(checkpoint).tokens == TOKENS
    assert resume(run, "--steps", "3", "--schedule", "constant") == 0
    assert resume(run, "--steps", "6", "--num-tokens", "301") == 1
    assert "--num-tokens 301 is not the run's 300" in capsys.readouterr().err

    command = ["generate", "--checkpoint", str(run), "--length", "5", "--seed", "0", "--prompt"]
    assert main([*command, "1 299 7"]) == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    assert len(ids) == 8 and ids[:3] == [1, 299, 7] and max(ids) < V
    for prompt in ("The city", "300", " "):
        assert main([*command, prompt]) == 1
        assert "--prompt must be ids in [0, 300) with spaces" in capsys.readouterr().err

    evaluate = ["eval", "--checkpoint", str(run), "--out", str(tmp_path / "val.json")]
    assert main([*evaluate, "--split", "val"]) == 0
    figures = json.loads((tmp_path / "val.json").read_text())
    assert figures["tokens"] == 500 and "bits_per_byte" not in figures
    assert figures["bits_per_token"] == pytest.approx(math.log2(V), rel=0.1)
    assert "bits per token over 500 tokens" in capsys.readouterr().out
    DESCRIBED.write(file)  # by which bits per byte are known
    evaluate[-1] = str(tmp_path / "all.json")
    assert main([*evaluate, "--data", str(file)]) == 0
    figures = json.loads((tmp_path / "all.json").read_text())
    assert figures["bits_per_byte"] == figures["bits_per_token"] / 4
    assert main([*evaluate[:3], "--words", "--split", "val"]) == 1
    assert "--words is for bytes" in capsys.readouterr().err


def test_a_run_with_known_bytes_per_token(file, tmp_path):
    DESCRIBED.write(file)
    assert (
        main(["train", *TINY, "--steps", "2", "--data", str(file), "--out", str(tmp_path / "o")])
        == 0
    )
    for row in read(tmp_path / "o" / "metrics.jsonl"):
        prefix = "val_" if "val_bits_per_byte" in row else ""
        assert row[f"{prefix}bits_per_byte"] == row[f"{prefix}bits_per_token"] / 4


def test_id_0_is_an_id_like_others(tmp_path):
    """A run's model learns it; the reconstruction alone leaves it out, as upstream does."""
    config, _ = parse(["--preset", "cpu", *TINY[2:], "--data", "x.bin", "--num-tokens", "9"])
    model = config.model.kind(**config.model.arguments())
    ids = torch.zeros(1, 33, dtype=torch.long)
    _, (ce, recon, _) = model(ids, return_loss=True)
    expected = -model(ids[:, :-1]).log_softmax(-1)[..., 0].mean()
    torch.testing.assert_close(ce, expected)
    assert recon == 0
