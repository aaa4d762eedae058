"""An object of upstream as one of ours, on its parameters; of the version that is installed.

0.4.0 has the package name of 0.2.0. Put it in a folder, as benchmarks/bench_next_latent.py says:

    PYTHONPATH=FOLDER python -m pytest tests/test_from_upstream.py
"""

import copy
import inspect
import warnings

import pytest
import torch
from covering import ROWS
from helpers import DEVICE
from next_latent_dumps import Convolution
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream
from torch import nn
from torch.utils._pytree import tree_leaves
from training import OPTIONS, draw

import shtx
from shtx import TrainStep, from_upstream, next_latent
from shtx.plan import unfused

IS_4 = "num_rollouts" in inspect.signature(Upstream.__init__).parameters
only_2 = pytest.mark.skipif(IS_4, reason="of 0.2.0")
only_4 = pytest.mark.skipif(not IS_4, reason="of 0.4.0, in a folder of PYTHONPATH")


class Weighted(nn.Module):
    """A loss of one's own, with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, z, y):
        return self.scale * (z - y).abs()


def build(**options):
    torch.manual_seed(0)
    model = Upstream(**OPTIONS | options).to(DEVICE)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model


def run(model, ids):
    """All that comes of a forward, and the gradients; what weighs nothing is 0, as are its."""
    loss, parts = model(ids, return_loss=True)
    if IS_4:
        *others, levels = parts
        weights = model.next_latent_loss_weight
        parts = *others, [level * bool(w) for level, w in zip(levels, weights, strict=True)]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True, allow_unused=True)
    gradients = torch.cat([gradient.flatten() for gradient in gradients])
    return [model(ids[:, :-1]), loss, *tree_leaves(parts), gradients]


def assert_taken_over(theirs, tokens=17):
    """The same parameters, the same outputs; the model of before stays as it was."""
    before = [(p.detach().clone(), p.requires_grad) for p in theirs.parameters()]
    ours = from_upstream(theirs)
    same = dict(theirs.named_parameters(remove_duplicate=False))
    found = dict(ours.named_parameters(remove_duplicate=False))
    assert found.keys() == same.keys() and all(found[name] is same[name] for name in same)
    for (value, flag), (name, p) in zip(before, theirs.named_parameters(), strict=True):
        assert torch.equal(p, value) and p.requires_grad == flag, name
    ids = torch.randint(0, theirs.token_emb.num_embeddings, (2, tokens), device=DEVICE)
    for o, t in zip(run(ours, ids), run(theirs, ids), strict=True):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)
    assert not unfused(ours).keys() - {"next_latent_loss_fn"}
    return ours


SHAPES = [
    {},
    dict(hierarchies=(1, 2, 8), dim=(16, 12, 10), window_sizes=(2, 0, None), ff_mult=(1.3, 4, 2)),
    dict(hierarchies=2, dim=12, hierarchical_stride=1, window_sizes=3, heads=3, depth=2),
    dict(hierarchies=(4, 1), hierarchical_stride=(2, 1), predict_hierarchy=1, depth=0),
    dict(hierarchy_merge_all=True, predict_use_all_hierarchy=True, ignore_index=5),
    dict(hierarchies=1, hierarchical_stride=1, dim=16, window_sizes=100, recon_loss_weight=0.3),
    dict(recon_loss_weight=0.0, heads=(1, 2), dim_head=(4, 6)),
]
SHAPES[1]["hierarchical_stride"] = (1, 1, 4)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_outputs_are_the_same(options):
    ours = assert_taken_over(build(**options))
    assert type(ours) is (next_latent if IS_4 else shtx).HierarchicalTransformer
    made = type(ours)(**OPTIONS | options)
    ff_mult = lambda model: [int(level.dim * level.ff_mult) for level in model.levels]
    assert ff_mult(ours) == ff_mult(made) and ours.way == made.way
    for name in ("dims", "h_strides", "seq_len", "ignore_index", "recon_loss_weight"):
        assert getattr(ours, name) == getattr(made, name), name
    windows = lambda model: [level.window for level in model.levels] * bool(len(model.layers))
    assert windows(ours) == windows(made)


@only_2
@pytest.mark.parametrize("row", range(0, len(ROWS), 12))
def test_any_configuration(row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_taken_over(build(**ROWS[row][0]), ROWS[row][1])


@only_4
@pytest.mark.parametrize(
    "options",
    [
        dict(next_latent_loss_type="mse", num_rollouts=3, rollout_weights=(1.0, 2.0, 4.0)),
        dict(next_latent_loss_type="smooth_l1", dynamics_hidden_dim=7, dynamics_num_layers=2),
        dict(dynamics_num_layers=1, dynamic_rollout_loss_weight=False, detach_summaries=False),
        dict(next_latent_loss_weight=(0.0, 0.3), num_rollouts=2, dynamic_loss_decay=0.3),
        dict(next_latent_loss_weight=0.0),
        dict(next_latent_loss_type=lambda z, y: (z - y).square()),
    ],
    ids=" ".join,
)
def test_next_latent_losses(options):
    assert_taken_over(build(**options))


@only_4
def test_modules_of_ones_own():
    summarizers = Convolution(16, 16, 1), Convolution(16, 8, 2)
    summarizers[0].conv.bias.requires_grad_(False)
    theirs = build(
        chunk_summarizers=summarizers,
        next_latent_loss_type=Weighted(),
        next_latent_loss_weight=(0.0, 0.2),
    )
    ours = assert_taken_over(theirs)
    assert ours.chunk_summarizers[0] is summarizers[0]
    changed = build()
    changed.next_latent_loss_fn.weight = 0.5
    assert_taken_over(changed)


def test_an_optimizer_goes_on():
    theirs, alone = build(), build()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=2**-7) for m in (theirs, alone)]

    def step(model, optimizer, n):
        optimizer.zero_grad()
        model(draw(n), return_loss=True)[0].backward()
        optimizer.step()

    for model, optimizer in zip((theirs, alone), optimizers, strict=True):
        for n in range(2):
            step(model, optimizer, n)
    step(alone, optimizers[1], 2)
    train = TrainStep(from_upstream(theirs), optimizers[0], precision="fp32", cuda_graph=False)
    train(draw(2))
    for (name, p), q in zip(theirs.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert all(s["step"] == 3 for s in optimizers[0].state_dict()["state"].values())


def test_what_was_set_later_is_read():
    theirs = build().eval()
    theirs.recon_loss_weight, theirs.ignore_index, theirs.seq_len = 0.7, 3, 30
    theirs.note = "of the user"
    theirs.to_logits.weight.requires_grad_(False)
    ours = assert_taken_over(theirs)
    assert ours.seq_len == 30 and not ours.training
    theirs.recon_loss_weight = 0.0
    assert from_upstream(theirs)(draw(0), return_loss=True)[1][2 if IS_4 else 1] > 0


def test_tied_and_narrow_parameters():
    theirs = build(dim=16)
    theirs.to_logits.weight = theirs.token_emb.weight
    ours = assert_taken_over(theirs)
    assert ours.to_logits.weight is ours.token_emb.weight
    half = from_upstream(build().bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(draw(0)).isfinite().all()


def greedy(model):
    return model.generate(draw(0, tokens=5), 8, temperature=0)


def test_it_generates_and_is_pickled():
    theirs = build()
    ours = from_upstream(theirs)
    logits = theirs(torch.cat((draw(0, tokens=5), greedy(ours)), dim=1))[:, 4:-1]
    assert torch.equal(logits.argmax(-1), greedy(ours))
    assert torch.equal(greedy(copy.deepcopy(ours)), greedy(ours))


class Subclass(Upstream):
    pass


def replaced(model):
    model.layers[0][0].ff.net[2] = nn.ReLU()


def widened(model):
    model.to_logits = nn.Linear(16, 40, bias=False)


def hooked(model):
    model.layers[0][1].attn.register_forward_hook(lambda *_: None)


def forwarded(model):
    model.layers[0][0].forward = lambda x: x


def deeper(model):
    model.layers[0].append(nn.Identity())


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.layers[0][0].ff.net[1])


def dropped(model):
    model.layers[0][0].attn.attn_fn.dropout.p = 0.1


def blocks_that_differ(model):
    model.layers[1] = build(window_sizes=(2, None)).layers[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (replaced, "model.layers.0.0.ff.net.2 must be the GELU that it was made, got a ReLU"),
        (widened, "model.to_logits.out_features must be 31 .*, got 40"),
        (hooked, "model.layers.0.1.attn must have no hooks, got forward hooks"),
        (forwarded, "model.layers.0.0.forward must be that of its class"),
        (deeper, "cannot be read: .*Identity"),
        (
            parametrized,
            r"model.layers.0.0.ff.net.1 must be the Linear .*, got a ParametrizedLinear",
        ),
        (dropped, r"model.layers.0.0.attn.attn_fn.dropout.p must be 0.0 .*, got 0.1"),
        (blocks_that_differ, "model.layers.1.0.attn.window_size must be 4 .*, got 2"),
        (lambda m: delattr(m, "hierarchies"), "cannot be read: .*hierarchies"),
        (lambda m: setattr(m, "dims", (16, 9)), r"model.*must .*got"),
    ],
)
def test_what_was_changed_is_named(change, message):
    model = build(depth=2)
    change(model)
    with pytest.raises(ValueError, match=message):
        from_upstream(model)


@pytest.mark.parametrize("make", [lambda: Subclass(**OPTIONS), lambda: nn.Linear(1, 1)])
def test_what_is_no_model_of_upstream(make):
    with pytest.raises(TypeError, match="model must be a HierarchicalTransformer of simple-hier"):
        from_upstream(make())
    with pytest.raises(TypeError, match="got shtx's HierarchicalTransformer"):
        from_upstream(shtx.HierarchicalTransformer(**OPTIONS))
