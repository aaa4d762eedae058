"""A small model to train, and when two of them are the same."""

from types import SimpleNamespace

import torch
from helpers import DEVICE, TWO_LEVELS
from torch.utils._pytree import tree_leaves

from shtx import HierarchicalTransformer, TrainStep
from shtx.train_step import Step

OPTIONS = TWO_LEVELS | dict(dim=(16, 8), depth=1, dim_head=8, seq_len=24)
LR = 2.0**-7  # and its halves are the same in fp32 and fp64


def build(**options):
    torch.manual_seed(0)
    return HierarchicalTransformer(**OPTIONS | options).to(DEVICE)


def draw(seed, batch=4, tokens=17):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 31, (batch, tokens), generator=generator).to(DEVICE)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **dict(lr=LR, fused=True) | options)


def pair(model, **options):
    optimizer = adamw(model)
    return TrainStep(model, optimizer, **dict(precision="fp32") | options), optimizer


def replay_a_step(step, ids, labels):
    """Stand in for a capture where there is no GPU: a replay is a step on the ids it reads."""
    step_of_shape = Step(ids.clone(), None if labels is None else labels.clone(), None, ())

    def replay():
        outputs = step._step(step_of_shape.ids, step_of_shape.labels)
        step_of_shape.outputs = step_of_shape.outputs or outputs
        for a, b in zip(tree_leaves(step_of_shape.outputs), tree_leaves(outputs), strict=True):
            assert (a is None and b is None) or a.copy_(b) is a

    step_of_shape.graph = SimpleNamespace(replay=replay)
    return step_of_shape


def assert_same_parameters(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.grad is None


def assert_same(ours, theirs):
    """Parameters, and all that the optimizer keeps, to the bit."""
    (model, optimizer), (other, other_optimizer) = ours, theirs
    assert_same_parameters(model, other)
    state, other_state = optimizer.state_dict(), other_optimizer.state_dict()
    assert state["param_groups"] == other_state["param_groups"]
    assert state["state"].keys() == other_state["state"].keys()
    for index, values in state["state"].items():
        for name, value in values.items():
            assert torch.equal(value, other_state["state"][index][name]), name
