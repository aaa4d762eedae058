"""Weights of upstream 0.2.0 as those of 0.4.0, and back; `shtx convert`."""

import pytest
import safetensors.torch
import torch
import training
from running import resume, train
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream

import shtx
from shtx import next_latent
from shtx.cli import main
from shtx.convert import convert
from shtx.train.checkpoint import load
from shtx.versions import version_of

OPTIONS = training.OPTIONS | dict(dim=(16, 12), depth=2)


@pytest.fixture(scope="module")
def model():
    """Upstream 0.2.0's."""
    torch.manual_seed(0)
    model = Upstream(**OPTIONS)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def draw(tokens=20):
    return torch.randint(0, 31, (2, tokens), generator=torch.Generator().manual_seed(1))


def loaded(state, options=OPTIONS, **more):
    ours = next_latent.HierarchicalTransformer(**options, **more)
    ours.load_state_dict(state)
    assert list(state) == list(ours.state_dict())
    return ours


def test_there_and_back(model):
    """The same logits, and of the trunk the same bits."""
    state = model.state_dict()
    sizes = dict(dynamics_hidden_dim=10, dynamics_num_layers=2)
    there = convert(state, "0.4.0", **sizes)
    ours = loaded(there, **sizes)
    torch.testing.assert_close(ours(draw()), model(draw()), rtol=1e-5, atol=1e-5)
    _, (*_, levels) = ours(draw(), return_loss=True)
    assert all(level > 0 for level in levels)

    back = convert(there, "0.2.0")
    shtx.HierarchicalTransformer(**OPTIONS).load_state_dict(back)
    assert list(back) == list(state) and version_of(back) == "0.2.0"
    for name, t in state.items():
        if name.endswith(".scale"):
            torch.testing.assert_close(back[name], t)
        elif not name.startswith("to_hierarchical_preds."):
            assert torch.equal(back[name], t), name


def test_new_weights_are_those_of_a_seed(model):
    states = [convert(model.state_dict(), "0.4.0", seed=seed) for seed in (1, 1, 2)]
    name = "latent_dynamics.0.net.1.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert not states[0]["latent_dynamics.0.net.5.weight"].any()  # foretells what is


@pytest.mark.parametrize("to", ["0.2.0", "0.4.0"])
@pytest.mark.parametrize("strict", [False, True])
def test_the_wrong_version_is_not_loaded(model, to, strict):
    state = model.state_dict()
    kind = next_latent.HierarchicalTransformer
    if to == "0.2.0":
        state, kind = convert(state, "0.4.0"), shtx.HierarchicalTransformer
    ours = kind(**OPTIONS)
    before = ours.to_logits.weight.clone()
    with pytest.raises(RuntimeError, match=f"convert --to {to}.*; this model is of {to}"):
        ours.load_state_dict(state, strict=strict)
    wrapped = torch.nn.ModuleDict(dict(inner=ours))
    with pytest.raises(RuntimeError, match=f"this model is of {to}"):
        wrapped.load_state_dict({f"inner.{k}": t for k, t in state.items()}, strict=strict)
    assert torch.equal(ours.to_logits.weight, before)


def test_what_cannot_be_converted(model):
    state = model.state_dict()
    with pytest.raises(ValueError, match="of another version than 0.2.0 .*, got 0.2.0"):
        convert(state, "0.2.0")
    with pytest.raises(ValueError, match="got 0.3.0"):
        convert({**convert(state, "0.4.0"), "latent_ar_losses.0.net.1.weight": draw()}, "0.2.0")
    with pytest.raises(ValueError, match="with token_emb.weight, got keys weight"):
        convert({"weight": draw()}, "0.4.0")
    with pytest.raises(ValueError, match="to must be '0.2.0' or '0.4.0', got '0.5.0'"):
        convert(state, "0.5.0")


def run(source, to, out):
    return main(["convert", str(source), "--to", to, "--out", str(out)])


def test_files(model, tmp_path, capsys):
    old, new, back = (tmp_path / name for name in ("old.pt", "new.safetensors", "back.pt"))
    torch.save(model.state_dict(), old)
    assert run(old, "0.4.0", new) == run(new, "0.2.0", back) == 0
    loaded_back = torch.load(back, weights_only=True)
    assert torch.equal(loaded_back["to_logits.weight"], model.to_logits.weight)
    capsys.readouterr()

    (tmp_path / "other.pt").write_bytes(old.read_bytes()[:-100])
    torch.save({"model": model.state_dict()}, tmp_path / "nested.pt")
    for source, to, out, message in (
        (old, "0.4.0", new, f"--out {new}: is there already"),
        (old, "0.4.0", tmp_path / "run", "must end in .pt or .safetensors: a run has data"),
        (old, "0.2.0", tmp_path / "a.pt", "state must be of another version than 0.2.0"),
        (tmp_path / "nested.pt", "0.4.0", tmp_path / "a.pt", "must be a state_dict, of names"),
        (tmp_path / "other.pt", "0.4.0", tmp_path / "a.pt", "other.pt: damaged"),
        (tmp_path / "no.pt", "0.4.0", tmp_path / "a.pt", "No such file"),
        (tmp_path, "0.4.0", tmp_path / "a.pt", "no checkpoint there"),
    ):
        assert run(source, to, out) == 1
        assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("back.pt", "nested.pt", "new.safetensors", "old.pt", "other.pt"),
    ]


def test_runs(text, tmp_path):
    """A run of next latents goes on, generates, and is a file of either version."""
    out, options = tmp_path / "run", ("--objective", "next-latent", "--num-rollouts", "2")
    assert train(text, out, *options, "--steps", "4", "--eval-every", "4") == 0
    assert resume(out, "--steps", "6") == 0
    prompt = ("--prompt", "line", "--length", "3")
    assert main(["generate", "--checkpoint", str(out), *prompt]) == 0
    weights = load(out).weights
    assert version_of(weights) == "0.4.0"
    for to in ("0.2.0", "0.4.0"):
        assert run(out, to, tmp_path / f"{to}.safetensors") == 0
        state = safetensors.torch.load_file(tmp_path / f"{to}.safetensors")
        assert version_of(state) == to
    assert all(torch.equal(t, weights[name]) for name, t in state.items())
