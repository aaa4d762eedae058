"""The model of a run, as `shtx.load` gives it."""

import pytest
import torch
from running import train

import shtx
from shtx.train import TrainError, trainer
from shtx.train.checkpoint import find, load, whole


@pytest.fixture(scope="module")
def averaged_run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("averaged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "SAMPLE", 4)
        assert train(text, out, "--ema", "0.9") == 0
    return out


def test_load(run, averaged_run):
    model = shtx.load(run, device="cpu")
    assert isinstance(model, shtx.HierarchicalTransformer) and not model.training
    weights = load(run).weights
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    narrow = shtx.load(str(run), 8, device="cpu", dtype=torch.bfloat16)
    assert narrow.to_logits.weight.dtype == torch.bfloat16
    older = load(run / "checkpoints" / "step-000008").weights["to_logits.weight"]
    assert narrow.to_logits.weight.equal(older.bfloat16())
    average = whole(load(averaged_run)).state["ema"]["to_logits.weight"]
    loaded = shtx.load(averaged_run, "best", device="cpu", ema=True)
    assert loaded.to_logits.weight.equal(average)
    assert shtx.load(find(run, 8), device="cpu").generate(torch.ones(1, 1).long(), 3).shape == (
        1,
        3,
    )


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(step=9), TrainError, "step must be one of 8, 12, 'best' or None, got 9"),
        (dict(step="worst"), TrainError, "step must be one of 8, 12, 'best' or None, got 'worst'"),
        (dict(ema=True), TrainError, "has no averaged weights: its run had no --ema"),
        (dict(dtype=torch.int8), TypeError, "dtype must be of floating point or None, got torch.i"),
    ],
)
def test_load_refuses(run, options, error, message):
    with pytest.raises(error, match=message):
        shtx.load(run, device="cpu", **options)
    with pytest.raises(TrainError, match="is one checkpoint: step must be None, got 3"):
        shtx.load(find(run), 3, device="cpu")
    with pytest.raises(TrainError, match="nowhere: no checkpoint there"):
        shtx.load("nowhere")


def test_load_without_the_extra(run, monkeypatch):
    monkeypatch.setattr("shtx.loading.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'tyro, safetensors, numpy not installed: pip install "s'
    ):
        shtx.load(run)
