"""Gradients of gradients: the fused ops refuse them, the reference has upstream's."""

import pytest
import torch
from helpers import DEVICE
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import shtx_kernels
from shtx import HierarchicalTransformer
from shtx_kernels import reference

IDS = torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
SMALL = dict(num_tokens=17, dim=(16, 8), depth=1, heads=1, dim_head=8, seq_len=32)
SMALL |= dict(window_sizes=(4, None), hierarchies=(1, 2))


def draw(*shape):
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def calls():
    """A call of every op, as a function of the namespace, and a tensor that requires grad."""
    x, w, w_out, embedding = draw(2, 12, 8), draw(8, 8), draw(8, 8), draw(9, 8)
    yield "linear", lambda ops: ops.linear(x, w), x
    yield "feed_forward", lambda ops: ops.feed_forward(x, w, w_out), x
    yield "token_embedding", lambda ops: ops.token_embedding(IDS, embedding, w), embedding
    gamma = draw(8)
    yield "norm_token_shift", lambda ops: ops.norm_token_shift(x, gamma, dilation=1)[1], x
    qkv = draw(2, 12, 24)
    yield "rotary_attention", lambda ops: ops.rotary_attention(qkv, 2), qkv
    conv, out, bias, b_out = draw(8, 8, 2), draw(8, 8, 1), draw(8), draw(8)
    weights = conv, bias, out, b_out
    compress = lambda ops: ops.causal_compress(IDS, embedding, *weights, stride=2)
    yield "causal_compress", compress, conv
    merge = lambda ops: ops.hierarchical_merge([x], [1], gamma, w, bias, w_out, b_out)[1]
    yield "hierarchical_merge", merge, x
    yield "hierarchical_ar_loss", lambda ops: ops.hierarchical_ar_loss(x, w, bias), x
    yield "linear_cross_entropy", lambda ops: ops.linear_cross_entropy(x, embedding, IDS), x
    summarize = lambda ops: ops.chunk_summary(IDS, embedding, w, bias, compress=4, stride=2)
    yield "chunk_summary", summarize, embedding
    layers = [(draw(8, 16), bias), (w_out, b_out)]
    given = draw(2, 12, 8), IDS > 1, (draw(16), draw(16)), layers, torch.ones(2, device=DEVICE)
    yield "next_latent_loss", lambda ops: ops.next_latent_loss(x, *given)[0], x
    reconstruct = dict(compress=1, stride=1)
    loss = lambda ops: ops.reconstruction_loss(x, embedding, IDS, **reconstruct)
    yield "reconstruction_loss", loss, x


CALLS = list(calls())
NAMES = [name for name, *_ in CALLS]


def test_every_op_is_here():
    assert sorted(NAMES) == sorted(shtx_kernels.__all__)


@pytest.mark.parametrize("name, call, x", CALLS, ids=NAMES)
def test_a_graph_of_the_fused_backward_is_refused(name, call, x):
    loss = call(shtx_kernels).sum()
    with pytest.raises(RuntimeError, match=rf'fused .*{name}.* impl="reference"'):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name, call, x", CALLS, ids=NAMES)
def test_the_fused_backward_repeats(name, call, x):
    loss = call(shtx_kernels).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("name, call, x", CALLS, ids=NAMES)
def test_the_refusal_is_no_part_of_compiled_graphs(name, call, x):
    torch.compiler.reset()
    fn = torch.compile(lambda: call(shtx_kernels).sum(), fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(fn(), x)
    (eager,) = torch.autograd.grad(call(shtx_kernels).sum(), x)
    torch.testing.assert_close(compiled, eager)


def models(impl="reference"):
    torch.manual_seed(0)
    ours = HierarchicalTransformer(**SMALL, impl=impl).to(DEVICE)
    ids = torch.randint(0, 17, (2, 17), device=DEVICE)
    return ours, ids


def penalised(model, ids) -> dict[str, torch.Tensor]:
    """Gradients of the loss and of a penalty on its gradients."""
    loss = model(ids, return_loss=True)[0]
    gradients = torch.autograd.grad(
        loss, list(model.parameters()), create_graph=True, allow_unused=True
    )
    (loss + 10 * sum(g.square().sum() for g in gradients if g is not None)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_penalty_of_the_fused_model_is_refused():
    with pytest.raises(RuntimeError, match='impl="reference"'):
        penalised(*models("fused"))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_the_fused_model_are_refused(transform):
    model, ids = models("fused")
    parameters = dict(model.named_parameters())
    if transform == "grad":
        fn = torch.func.grad(lambda p: loss_of(p, model, ids))
    else:
        parameters = {name: torch.stack([p, p]).detach() for name, p in parameters.items()}
        fn = torch.func.vmap(lambda p: functional_call(model, p, (ids,)))
    with pytest.raises(RuntimeError, match=r'torch.func .* impl="reference"'):
        fn(parameters)


def test_many_models_at_once_by_the_reference():
    """Weights and buffers stacked, of which one model has buffers of its own."""
    (one, ids), (other, _) = models(), models()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    full = SMALL["window_sizes"].index(None)
    other.layers[0][full].attn.rotary_emb.inv_freq *= 0.5
    stacked = torch.func.stack_module_state([one, other])
    logits = torch.func.vmap(lambda p, b: functional_call(one, (p, b), (ids,)))(*stacked)
    expected = torch.stack([one(ids), other(ids)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_gradient_penalty_is_that_of_upstream():
    from simple_hierarchical_transformer import HierarchicalTransformer as Upstream

    ours, ids = models()
    theirs = Upstream(**SMALL).to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    expected, gradients = penalised(theirs, ids), penalised(ours, ids)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name


def loss_of(parameters: dict, model, ids):
    return functional_call(model, parameters, (ids,), dict(return_loss=True))[0]


def test_forward_mode_of_the_reference():
    model, ids = models()
    parameters = dict(model.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    loss, tangent = jvp(lambda p: loss_of(p, model, ids), (parameters,), (tangents,))
    gradients = torch.autograd.grad(
        loss_of(parameters, model, ids), list(parameters.values()), allow_unused=True
    )
    pairs = zip(gradients, tangents.values(), strict=True)
    expected = sum((g * t).sum() for g, t in pairs if g is not None)
    torch.testing.assert_close(tangent.to(loss), expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(p.detach(), tangents[k]) for k, p in parameters.items()}
        dual = forward_ad.unpack_dual(loss_of(duals, model, ids))
        torch.testing.assert_close(dual.tangent, expected, rtol=1e-4, atol=1e-5)


def test_hessian_of_the_reference():
    model, ids = models()
    parameters = dict(model.named_parameters())
    name = next(name for name in parameters if "gamma" in name)
    weight = parameters[name]
    of_weight = lambda w: loss_of(parameters | {name: w}, model, ids)
    (gradient,) = torch.autograd.grad(of_weight(weight), weight, create_graph=True)
    rows = [torch.autograd.grad(g, weight, retain_graph=True)[0] for g in gradient]
    expected = torch.stack(rows)
    error = (hessian(of_weight)(weight.detach()) - expected).norm() / expected.norm()
    assert error < 1e-4


ATTENTIONS = [dict(), dict(xpos=True, dilation=2), dict(window=3, dilation=2), dict(scale=0.3)]


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_second_gradients_of_attention(options):
    qkv = torch.randn(1, 7, 12, device=DEVICE, dtype=torch.float64, requires_grad=True)
    fn = lambda qkv: reference.rotary_attention(qkv, 2, **options)
    assert torch.autograd.gradgradcheck(fn, qkv)


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_first_gradients_of_attention_are_those_of_plain_pytorch(options):
    """The kernel that made the output makes them, not another formula."""
    qkv = draw(2, 40, 24)
    fn = lambda qkv: reference.rotary_attention(qkv, 2, **options)
    dout = torch.randn(2, 40, 8, device=DEVICE)
    compiled = torch.compile(fn, backend="eager", fullgraph=True)  # calls PyTorch's attention
    (plain,), (ours,) = (torch.autograd.grad(f(qkv), qkv, dout) for f in (compiled, fn))
    assert torch.equal(plain, ours)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(torch.autograd.grad(fn(qkv), qkv, dout)[0], ours)


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_checkpointed_attention(options):
    qkv = draw(2, 40, 24)
    runs = []

    def fn(qkv):
        runs.append(1)
        return reference.rotary_attention(qkv * 1, 2, **options).square()

    whole = torch.autograd.grad(fn(qkv).sum(), qkv)[0]
    again = torch.autograd.grad(checkpoint(fn, qkv, use_reentrant=False).sum(), qkv)[0]
    assert torch.equal(whole, again) and len(runs) == 3


def test_attention_keeps_nothing_past_its_backward():
    qkv = draw(2, 40, 24)
    out = reference.rotary_attention(qkv, 2)
    torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    torch.autograd.grad(out.sum(), qkv)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), qkv)
