"""The peer of the train step computes what the reference computes."""

import pytest
import torch
from helpers import DEVICE

from benchmarks import providers, repaired, shapes
from benchmarks.benchmark import benchmarks
from benchmarks.timing import DTYPE, check_agreement
from shtx_kernels import reference

CASES = [(None, 1, 40), (None, 3, 40), (8, 1, 40), (8, 3, 40), (5, 2, 33), (100, 1, 40)]


@pytest.mark.parametrize("window, dilation, M", CASES)
def test_attention_is_that_of_the_reference(window, dilation, M):
    """Gradients are compared where FlexAttention has them: not for a window on a CPU."""
    torch.manual_seed(0)
    qkv = torch.randn(2, M, 3 * 2 * 16, device=DEVICE, dtype=DTYPE)
    keywords = dict(window=window, dilation=dilation, xpos=window is None)
    has_gradient = DEVICE == "cuda" or repaired.is_full(window, -(-M // dilation))
    repaired.rotary_attention(qkv, 2, **keywords)  # makes its tables
    run = repaired.rotary_attention
    if DEVICE == "cuda":
        run = torch.compile(run, dynamic=False)  # a length is a key of the tables
    results = []
    for op in (run, reference.rotary_attention):
        leaf = qkv.clone().requires_grad_(has_gradient)
        out = op(leaf, 2, **keywords)
        dout = torch.arange(out.numel(), device=DEVICE).view_as(out).sin().to(DTYPE)
        results.append([out, *([torch.autograd.grad(out, leaf, dout)[0]] if has_gradient else [])])
    check_agreement(*results, 1e-5 if DTYPE == torch.float32 else 1e-2)


@pytest.mark.parametrize("config", "ABCD")
def test_the_model_has_the_loss_of_the_reference_and_its_tables_ahead(config, monkeypatch):
    config = shapes.SMALL[config]
    peer = providers.load("repaired", model := providers.build_reference(config), config)
    made = set(repaired.ANGLES), set(repaired.MASKS)
    ids = torch.randint(1, config.model["num_tokens"], (1, config.model["seq_len"] + 1))
    with torch.no_grad():
        ours, expected = (float(m(ids.to(DEVICE), return_loss=True)[0]) for m in (peer, model))
    assert ours == pytest.approx(expected, rel=1e-5)
    assert made == (set(repaired.ANGLES), set(repaired.MASKS))


def test_the_model_is_one_graph():
    """A break would leave the rest to eager PyTorch, and a window must not get another's mask."""
    config = shapes.SMALL["B"]  # windows of 16, of 32, and full attention
    peer = providers.load("repaired", model := providers.build_reference(config), config)
    ids = torch.randint(1, 256, (1, config.model["seq_len"] + 1), device=DEVICE)
    with torch.no_grad():
        compiled = torch.compile(peer, backend="eager", fullgraph=True)
        ours, expected = (float(m(ids, return_loss=True)[0]) for m in (compiled, model))
    assert ours == pytest.approx(expected, rel=1e-5)


def test_it_is_measured_where_its_attention_has_a_gradient():
    model = benchmarks()["model"]
    assert "repaired-compiled" in model.providers
    assert (model.why_not("repaired-compiled") is None) == (DEVICE == "cuda")
    assert model.compiles("repaired-compiled") and not model.compiles("upstream")
