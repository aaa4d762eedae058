"""`shtx eval`: every byte once, with the context that was asked for."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from helpers import DEVICE
from running import train, write_text

from shtx import HierarchicalTransformer
from shtx.cli import main
from shtx.train.score import score, window_starts

DATA = np.random.default_rng(0).integers(0, 256, 70).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = dict(num_tokens=256, dim=16, depth=1, seq_len=32, hierarchies=(1, 4))
    model = HierarchicalTransformer(
        **options, hierarchical_stride=(1, 4), window_sizes=(8, None), dim_head=8, heads=2
    )
    with torch.no_grad():  # so that context tells something
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.to(DEVICE)


def bits_of(model, seen):
    """Return the bits of the last of these bytes, given the others."""
    ids = torch.tensor(seen[None], device=DEVICE).long()
    with torch.no_grad():
        return -float(model(ids[:, :-1])[0, -1].double().log_softmax(-1)[ids[0, -1]]) / math.log(2)


@pytest.mark.parametrize("count, context, stride", [(70, 16, 5), (70, 32, 32), (20, 7, 1)])
def test_every_byte_once(model, count, context, stride):
    """Each from within the first window that has it."""
    data, expected = DATA[:count], 8.0
    starts = window_starts(count, context, stride)
    for i in range(1, count):
        start = next(s for s in starts if s < i <= s + context)
        expected += bits_of(model, data[start : i + 1])
        if i > context:
            assert i - start > context - stride
    model.train()
    for batch_size in (1, 3, 100):
        bits, _ = score(model, data, context, stride, batch_size=batch_size)
        assert bits == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("count", [2, 20, 33])
def test_what_fits_is_one_forward(model, count):
    ids = torch.tensor(DATA[None, :count], device=DEVICE).long()
    with torch.no_grad():
        logp = model(ids[:, :-1]).double().log_softmax(-1)
    expected = -logp.gather(-1, ids[:, 1:, None])[0, :, 0] / math.log(2)
    bits, by_position = score(model, DATA[:count], 32, 8)
    assert bits == pytest.approx(8 + float(expected.sum()), rel=1e-5)
    np.testing.assert_allclose(by_position, expected.cpu(), rtol=1e-4)


def test_positions_are_means_of_all_windows(model):
    _, by_position = score(model, DATA, 16, 6)
    starts = window_starts(len(DATA), 16, 6)
    for i in (1, 7, 16):
        expected = np.mean([bits_of(model, DATA[s : s + i + 1]) for s in starts])
        assert by_position[i - 1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(context=33, stride=1), "context must be 1 to 32, got 33"),
        (dict(context=0, stride=1), "context must be 1 to 32, got 0"),
        (dict(context=8, stride=9), "stride must be 1 to 8, got 9"),
        (dict(context=8, stride=8, batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(context=8, stride=8, data=DATA[:1]), "data must have at least 2 bytes, got 1"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        score(model, options.pop("data", DATA), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    text = write_text(folder / "text")
    assert train(text, folder / "run") == 0
    return folder / "run"


def evaluate(run, data, *arguments):
    return main(["eval", "--checkpoint", str(run), "--data", str(data), *arguments])


def test_the_command(run, tmp_path, capsys):
    """A packed file's bytes are scored, those that were trained on best; the figures are kept."""
    text = run.parent / "text"
    content = text.read_bytes()
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress(content))
    before = sorted(run.rglob("*"))
    out = tmp_path / "new" / "figures.json"
    options = "--context", "16", "--stride", "8", "--per-position", "--out", str(out)
    assert evaluate(run, packed, *options) == 0
    figures = json.loads(out.read_text())
    assert figures["bytes"] == len(content) and (figures["context"], figures["stride"]) == (16, 8)
    assert 0 < figures["bits_per_byte"] < 8 and len(figures["bits_by_position"]) == 16
    assert figures["bits"] == pytest.approx(figures["bits_per_byte"] * len(content))
    assert figures["bits_by_position"][0] > figures["bits_by_position"][-1]
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    told, *positions = capsys.readouterr().out.splitlines()[-6:]
    assert positions == [
        f"{n} byte{'s' * (n > 1)} before: {figures['bits_by_position'][n - 1]:.4f} bits per byte"
        for n in (1, 2, 4, 8, 16)
    ]
    assert f"{figures['bits_per_byte']:.4f} bits per byte over {len(content):,} bytes" in told

    parts = {}
    for part in ("training", "validation"):
        out = tmp_path / f"{part}.json"
        options = "--part", part, "--context", "16", "--stride", "8", "--out", str(out)
        assert evaluate(run, text, *options) == 0
        parts[part] = json.loads(out.read_text())
    assert [p["bytes"] for p in parts.values()] == [len(content) - len(content) // 10] + [
        len(content) // 10
    ]
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--stream", "--per-position"],
            "--per-position is of windows, and --stream takes their place",
        ),
        (["--context", "40"], "context must be 1 to 32, got 40"),
        (["--stride", "0"], "stride must be 1 to 32, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--out", "figures.txt"], "--out figures.txt: must end in .json"),
        (["--out", "kept.json"], "--out kept.json: is there already"),
        (["--data", "missing"], "--data missing: no such file"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
    ],
)
def test_bad_flags(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text("{}")
    assert evaluate(run, run.parent / "text", *arguments) == 1
    assert capsys.readouterr().err == f"shtx eval: error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
