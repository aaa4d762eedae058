"""Scores of a text as one stream, and figures per word."""

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
from shtx.train.evaluate import count_words
from shtx.train.score import score
from shtx.train.stream import reach, score_stream

DATA = np.random.default_rng(0).integers(0, 256, 700).astype(np.uint8)
SMALL = dict(num_tokens=256, dim=16, depth=1, seq_len=16, dim_head=8, heads=2)
MODELS = {
    "strides": dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=(4, 3)),
    "dilated": dict(hierarchies=(1, 4), hierarchical_stride=(1, 2), window_sizes=(3, 2), depth=2),
    "merge all": dict(
        hierarchies=(1, 2, 8),
        hierarchical_stride=(1, 1, 8),
        window_sizes=(4, 0, 1),
        hierarchy_merge_all=True,
        predict_use_all_hierarchy=True,
        depth=2,
    ),
}


def build(seq_len=16, **options):
    torch.manual_seed(0)
    model = HierarchicalTransformer(**SMALL | options | dict(seq_len=seq_len))
    with torch.no_grad():  # so that context tells something
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.to(DEVICE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_as_one_long_forward(name, lanes):
    """The score is that of a model with the same weights that has room for all of the data."""
    model, long = build(**MODELS[name]), build(1024, **MODELS[name])
    ids = torch.tensor(DATA[None], device=DEVICE).long()
    with torch.no_grad():
        logp = long(ids[:, :-1]).double().log_softmax(-1)
    expected = 8 - float(logp.gather(-1, ids[:, 1:, None]).sum()) / math.log(2)
    model.train()
    assert score_stream(model, DATA, lanes=lanes) == pytest.approx(expected, rel=1e-6)
    assert model.training
    windows = score(model, DATA, 16, 16).bits
    assert abs(windows - expected) > 1e-4 * expected  # which see less


@pytest.mark.parametrize("name", MODELS)
def test_reach(name):
    """Tokens further back change nothing; nearer ones do."""
    model = build(1024, **MODELS[name])
    far, span = reach(model), 600
    ids = torch.tensor(DATA[None, : span + 1], device=DEVICE).long()
    changed = ids.clone()
    changed[:, : span - far] ^= 1
    with torch.no_grad():
        assert torch.equal(model(ids)[0, -1], model(changed)[0, -1])
        changed[:, : span - 4] ^= 1
        assert not torch.equal(model(ids)[0, -1], model(changed)[0, -1])


@pytest.mark.parametrize("count", [2, 3, 17])
def test_short_data(count):
    model = build(**MODELS["strides"])
    expected = score(model, DATA[:count], 16, 1).bits  # one window
    assert score_stream(model, DATA[:count]) == pytest.approx(expected, rel=1e-6)


def test_bad_arguments():
    model = build(**MODELS["strides"])
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        score_stream(model, DATA, lanes=0)
    with pytest.raises(ValueError, match="data must have at least 2 bytes, got 1"):
        score_stream(model, DATA[:1])
    model = build(hierarchies=(1, 4), window_sizes=(4, None))
    with pytest.raises(ValueError, match="a window for every hierarchy, got full attention for 4"):
        score_stream(model, DATA)


def test_words_are_what_space_divides(monkeypatch):
    text = b"  one two\n\tthree,four\r\nfive\x0bsix  "
    data = np.frombuffer(text, np.uint8)
    for block in (1, 2, 5, 100):
        monkeypatch.setattr("shtx.train.files.BLOCK", block)
        assert count_words(data) == len(text.split()) == 5


def test_the_command(tmp_path, capsys):
    """Words of a packed file; a stream of a model with windows."""
    text = write_text(tmp_path / "text")
    text.write_bytes(text.read_bytes()[:4000])
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.read_bytes()))
    run = tmp_path / "run"
    assert train(text, run, "--window-sizes", "8", "4", "--steps", "2") == 0
    command = ["eval", "--checkpoint", str(run), "--data", str(tmp_path / "text.gz")]
    out = tmp_path / "figures.json"
    assert main([*command, "--stream", "--words", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["words"] == len(text.read_bytes().split()) and figures["stream"]
    assert figures["bits_per_word"] == figures["bits"] / figures["words"]
    assert "bits_by_position" not in figures and "context" not in figures
    assert not out.with_suffix(".png").exists()
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"{figures['bits_per_word']:.4f} bits per word over 4,000 bytes (as a stream" in told
    assert main([*command, "--stream", "--stride", "2"]) == 1
    assert "--stream takes their place" in capsys.readouterr().err
    full = tmp_path / "full"
    assert train(text, full, "--steps", "1") == 0
    assert main(["eval", "--checkpoint", str(full), "--split", "val", "--stream"]) == 1
    assert "got full attention for 4" in capsys.readouterr().err
