"""What tools and scripts do to a model besides putting modules in the place of others: to its
weights, its classes, and to the model as a whole. Numbers stay upstream's.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from test_plan import IMPLS, assert_same, draw, pair, replace
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import fusion, parametrizations, parametrize

from shtx.plan import unfused

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def weights_of_any_layout(model):
    for p in model.parameters():
        p.data = torch.stack((p.data, p.data), dim=-1)[..., 0]


def weights_that_are_computed_transposed(model):
    torch.manual_seed(4)
    for name in ("layers.0.0.attn.to_out", "hierarchical_merges.0.net.3", "to_logits"):
        parametrizations.orthogonal(model.get_submodule(name))


def weights_of_others(model):
    torch.manual_seed(4)
    other = {name: torch.randn_like(p) * 0.2 for name, p in model.named_parameters()}
    model.load_state_dict(other, strict=False, assign=True)
    model.requires_grad_(True)
    head = model.to_logits
    torch.utils.swap_tensors(head.weight, nn.Parameter(torch.randn_like(head.weight)))


def modules_that_are_shared(model):
    model.layers[1] = model.layers[0]
    model.to_logits.weight = model.token_emb.weight


def norms_that_were_folded(model):
    merge, norm = model.hierarchical_merges[0].net, nn.BatchNorm1d(32, device=DEVICE).eval()
    norm.running_mean.fill_(0.1)
    merge[1] = fusion.fuse_linear_bn_eval(merge[1].eval(), norm)


def modules_that_are_gone(model):
    model.layers[0][0].attn = None
    model.layers[0][1].ff.net[0] = nn.Identity()
    model.hierarchical_merges[1].net[1].bias = None


def an_embedding_with_more_to_it(model):
    model.token_emb = nn.Sequential(model.token_emb, nn.Dropout(0.0), nn.LayerNorm(16).to(DEVICE))


def hooks_of_the_model(model):
    model.register_forward_pre_hook(lambda module, args: (args[0].flip(1), *args[1:]))
    model.register_forward_hook(
        lambda module, args, out: out * 2 if isinstance(out, torch.Tensor) else (out[0] * 2, out[1])
    )


CHANGES = [
    *(weights_of_any_layout, weights_that_are_computed_transposed, weights_of_others),
    *(modules_that_are_shared, norms_that_were_folded, modules_that_are_gone),
    *(an_embedding_with_more_to_it, hooks_of_the_model),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_models(change):
    ours, theirs = pair("reference", depth=2)
    for model in (ours, theirs):
        change(model)
    assert_same(ours, theirs)
    prompt = draw(tokens=9)
    expected = theirs.generate(prompt, 3, temperature=0.0)
    assert torch.equal(ours.generate(prompt, 3, temperature=0), expected)


@pytest.mark.parametrize(
    "changes",
    [
        (weights_of_any_layout, hooks_of_the_model),
        (weights_of_others, weights_that_are_computed_transposed),
    ],
    ids=["data", "computed"],
)
def test_changed_models_stay_fused(changes):
    ours, theirs = pair("fused")
    for model in (ours, theirs):
        for change in changes:
            change(model)
    assert not unfused(ours)
    assert_same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_class_whose_forward_was_replaced(impl, monkeypatch):
    ours, theirs = pair(impl)
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: F.linear(x, m.weight, m.bias).tanh())
    assert "to_logits" in unfused(ours)
    assert_same(ours, theirs)
    monkeypatch.undo()
    assert not unfused(ours)


class Wide(nn.Module):
    """Leaves autocast, as is done for what overflows."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with torch.autocast(DEVICE, enabled=False):
            return self.module([t.float() for t in x] if isinstance(x, list) else x.float())


WIDE = [
    "layers.0.0 hierarchical_merges.0",
    "layers.0.1.ff layers.0.0.attn.to_out norms.0 to_logits",
]


@pytest.mark.parametrize("names", WIDE)
@pytest.mark.parametrize("impl", IMPLS)
def test_modules_that_leave_autocast(impl, names):
    """Whatever dtype they return, what is around them takes it."""
    losses = []
    for model in pair(impl):
        for name in names.split():
            replace(model, name, Wide)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, _ = model(draw(tokens=9), return_loss=True)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_functional_calls(impl):
    """With weights that are not the model's."""
    losses = []
    for model in pair(impl):
        weights = {name: (p * 1.3).detach() for name, p in model.named_parameters()}
        weights["to_logits.weight"].requires_grad_()
        loss, _ = functional_call(model, weights, (draw(),), dict(return_loss=True))
        (gradient,) = torch.autograd.grad(loss, weights["to_logits.weight"])
        losses.append((loss, gradient))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def ensemble(model):
    models = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p *= 1.2
    return stack_module_state(models)


def test_ensembles_of_the_reference():
    logits, ids = [], draw()
    for model in pair("reference"):
        call = lambda *parts, m=model: functional_call(m, parts, (ids,))
        logits.append(vmap(call)(*ensemble(model)))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_transforms_of_fused_ops_are_refused():
    ours, _ = pair("fused")
    ids, (weights, _) = draw(), ensemble(ours)
    loss = lambda p: functional_call(ours, p, (ids,), dict(return_loss=True))[0]
    with pytest.raises(RuntimeError, match=r'transforms of torch.func \(vmap.*impl="reference"'):
        vmap(loss)(weights)
    with pytest.raises(RuntimeError, match=r'transforms of torch.func \(vmap.*impl="reference"'):
        grad(loss)({name: p[0] for name, p in weights.items()})


@pytest.mark.gpu  # where auto is fused
def test_transforms_of_what_is_fused_by_itself():
    ours, theirs = pair("auto")
    ids, logits = draw(), []
    for model in (ours, theirs):
        weights, _ = ensemble(model)
        logits.append(vmap(lambda p, m=model: functional_call(m, p, (ids,)))(weights))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_weights_computed_once_for_several_forwards():
    ours, theirs = pair("reference")
    for model in (ours, theirs):
        parametrizations.weight_norm(model.to_logits)
    with parametrize.cached():
        assert_same(ours, theirs)
    assert not unfused(ours)


@pytest.mark.skipif(DEVICE == "cuda", reason="dynamic quantization is a CPU's")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_quantized_head(impl):
    """Logits and the loss are of the same head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [torch.ao.quantization.quantize_dynamic(m, {"to_logits"}) for m in pair(impl)]
    assert type(models[0].to_logits) is not nn.Linear
    results = [(m(draw()), m(draw(), return_loss=True)[0]) for m in models]
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


def test_a_head_that_was_taken_off():
    """What remains are embeddings, of the layer before it."""
    ours, theirs = pair("reference")
    for model in (ours, theirs):
        model.to_logits = nn.Identity()
    torch.testing.assert_close(ours(draw()), theirs(draw()), rtol=1e-4, atol=1e-4)


def test_windows_that_were_changed():
    """Of local-attention, in its own attribute."""
    ours, theirs = pair("reference")
    for model in (ours, theirs):
        model.layers[0][0].attn.attn_fn.window_size = 8
    assert_same(ours, theirs)
