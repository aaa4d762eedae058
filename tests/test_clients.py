"""The model in the hands of tools that change it: each does here what it does to upstream's.

They come with the extra `clients`, without which these tests are skipped.
"""

import copy
import warnings

import pytest
import torch
from helpers import DEVICE
from test_plan import IMPLS, assert_same, draw, pair, run

from shtx import TrainStep
from shtx.plan import unfused

# the names that README files of adaptors give: attention and feed-forward, and the heads
TARGETS = r".*(to_qkv|to_out|ff\.net\.1|ff\.net\.3|to_recon|hierarchical_merges\.0\.net\.1)"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs the extra clients")


def with_adaptors(peft, model):
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["to_logits"], init_lora_weights=False
    )
    torch.manual_seed(7)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("impl", IMPLS)
def test_lora(peft, impl):
    """The base is frozen: every adaptor and the saved head get upstream's gradient."""
    ours, theirs = pair(impl)
    before = run(theirs)[0][0]
    ours, theirs = (with_adaptors(peft, model) for model in (ours, theirs))
    assert abs(assert_same(ours, theirs) - before) > 5e-5
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) > 20 and all(p.grad.abs().sum() > 0 for p in trained)
    if impl == "fused" and DEVICE == "cpu":
        return  # interpreted, whole models take long for a token
    prompt = draw(tokens=9)
    tokens = ours.base_model.model.generate(prompt, 3, temperature=0)
    assert torch.equal(tokens, theirs.base_model.model.generate(prompt, 3, temperature=0.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_lora_merged_is_plain_again(peft, impl):
    ours, theirs = pair(impl)
    ours, theirs = (with_adaptors(peft, model).merge_and_unload() for model in (ours, theirs))
    ours.requires_grad_(True), theirs.requires_grad_(True)
    # PEFT leaves the head that it saved in a wrapper
    assert not unfused(ours).keys() - {"to_logits"}
    assert_same(ours, theirs)


def test_copies_of_lora_have_adaptors_of_their_own(peft):
    ours, theirs = (with_adaptors(peft, model) for model in pair("reference"))
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora" in name:
                p.mul_(3)
    assert_same(other, theirs)


def test_lora_in_a_train_step(peft):
    model = with_adaptors(peft, pair("reference")[0]).base_model.model
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    step = TrainStep(model, torch.optim.SGD(trained, 0.5), precision="fp32", cuda_graph=False)
    losses = [float(step(draw())[0]) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("impl", IMPLS)
def test_quantized_weights(impl):
    """torchao keeps the modules and makes their weights tensors of another type."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra clients")
    ours, theirs = pair(impl)
    exact = ours(draw())
    for model in (ours, theirs):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "to_logits" in unfused(ours) and "layers.0.0.ff.net.1" in unfused(ours)
    with torch.no_grad():
        logits, expected = ours(draw()), theirs(draw())
        loss, _ = ours(draw(), return_loss=True)
        expected_loss, _ = theirs(draw(), return_loss=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_products_in_float8(impl):
    """torchao makes linear modules a subclass, which rounds what it multiplies."""
    float8 = pytest.importorskip("torchao.float8", reason="needs the extra clients")
    config = float8.Float8LinearConfig(emulate=True)  # products as narrow as 8 have no kernel
    ours, theirs = pair(impl)
    exact = run(theirs)[0][0]
    for model in (ours, theirs):
        float8.convert_to_float8_training(
            model, config=config, module_filter_fn=lambda m, name: "ff.net" in name
        )
    assert unfused(ours).keys() == {
        f"layers.0.{level}.ff.net.{i}" for level in range(2) for i in (1, 3)
    }
    assert abs(assert_same(ours, theirs) - exact) > 5e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(DEVICE == "cuda", reason="dynamic quantization is a CPU's")
def test_dynamic_quantization():
    ours, theirs = pair("reference")
    exact = ours(draw())
    ours, theirs = (
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}) for model in (ours, theirs)
    )
    logits = ours(draw())
    torch.testing.assert_close(logits, theirs(draw()), rtol=1e-2, atol=1e-2)
    assert not torch.equal(logits, exact)


def test_moving_average_of_the_weights():
    ema_pytorch = pytest.importorskip("ema_pytorch", reason="needs the extra clients")
    model, _ = pair("reference")
    ema = ema_pytorch.EMA(model, beta=0.5, update_after_step=0, update_every=1)
    expected = model(draw())
    torch.testing.assert_close(ema(draw()), expected)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep(model, optimizer, precision="fp32", cuda_graph=False)
    for _ in range(3):
        step(draw())
        ema.update()
    averaged = ema(draw())
    assert not torch.equal(averaged, expected) and not torch.equal(averaged, model(draw()))
    assert not unfused(ema.ema_model)
    prompt = draw(tokens=9)
    assert ema.ema_model.generate(prompt, 3).shape == (2, 3)
