"""Upstream 0.4.0 is the oracle of shtx.next_latent: arguments, weights, numbers and gradients, from
what tests/next_latent_dumps.py has kept of it.
"""

import copy
import inspect
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import training
from covering import COUNT
from helpers import DEVICE
from next_latent_dumps import (
    GENERATED,
    PATH,
    SEEDED,
    Convolution,
    absolute,
    fill,
    parameters_of,
    project,
    results,
    seeded,
)
from next_latent_dumps import draw as draw_row
from torch.nn.parallel import DistributedDataParallel

from shtx import TrainStep
from shtx.layers import InterleavedRotary
from shtx.next_latent import HierarchicalTransformer

KEPT = np.load(PATH)
ABOUT = json.loads(KEPT["about"].tobytes())
ROWS = ABOUT["rows"]


def make(row, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows larger than the sequence
        return seeded(HierarchicalTransformer, ROWS[row]["options"], **more)


def left_out(model):
    """Names of what upstream computes for levels of weight 0, which this model leaves out."""
    weights = model.next_latent_loss_weight
    return {f"level.{i}" for i, weight in enumerate(weights) if weight == 0 and any(weights)}


def assert_same(model, row, relative):
    about = ROWS[row]
    ids = draw_row(about["options"], about["tokens"], about["ignored_row"]).to(DEVICE)
    found = results(model, ids, about["ablate"])
    assert list(found) == about["names"]
    for name, expected in zip(found, KEPT[f"{row}.results"], strict=True):
        if name not in left_out(model):
            error = np.abs(project(found[name]) - expected).max()
            assert error <= relative * expected[0], f"{name}: {error:.1e} off {expected[0]:.1e}"


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_same_numbers(row):
    model = fill(make(row, impl="reference")).to(DEVICE)
    state = model.state_dict()
    assert list(state) == ROWS[row]["keys"]
    assert [list(t.shape) for t in state.values()] == ROWS[row]["shapes"]
    assert_same(model, row, 2e-5)
    model.zero_grad()
    assert_same(model.double(), row, 1e-10)


@pytest.mark.parametrize("row", [3, 11, 17, 29, 40])
def test_same_numbers_fused(row):
    assert_same(fill(make(row, impl="fused")).to(DEVICE), row, 2e-5)


def test_covers_what_it_says():
    options = [row["options"] for row in ROWS]
    assert len(ROWS) >= COUNT
    for name, values in {
        "next_latent_loss_type": {"mse_and_cosine_sim", "mse", "smooth_l1", "callable", "module"},
        "num_rollouts": {1, 2, 3},
        "chunk_summarizers": {None, "convolutions", "shared"},
        "dynamics_num_layers": {1, 2, 3, 4},
    }.items():
        assert {o[name] for o in options} == values
    assert any(0 in o["next_latent_loss_weight"] for o in options
               if isinstance(o["next_latent_loss_weight"], list))  # fmt: skip
    assert any(row["ignored_row"] and row["options"]["ignore_index"] >= 0 for row in ROWS)


@pytest.mark.parametrize("row", SEEDED)
def test_a_seed_gives_upstreams_initial_weights(row):
    state = make(row).state_dict()
    for (name, t), expected in zip(state.items(), KEPT[f"{row}.initial"], strict=True):
        np.testing.assert_allclose(project(t), expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("row", GENERATED)
def test_a_seed_generates_upstreams_tokens(row):
    model = fill(make(row)).to(DEVICE)
    prompt = draw_row(ROWS[row]["options"], 5, False).to(DEVICE)
    torch.manual_seed(3)
    tokens = model.generate(prompt, 9, 0.7, 0.5, use_cache=False)
    if DEVICE == "cpu":  # whose random numbers the oracle has drawn
        assert tokens.tolist() == ROWS[row]["tokens_of_seed_3"]
    greedy = [model.generate(prompt, 9, 0, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*greedy)


def test_same_arguments_and_defaults():
    of_forward = ["loss_reduction", "labels", "plan"]
    for name, added in dict(__init__=["impl"], forward=of_forward).items():
        ours = {
            k: repr(v) for k, v in parameters_of(getattr(HierarchicalTransformer, name)).items()
        }
        for own in added:
            del ours[own]
        assert list(ours.items()) == list(ABOUT["signatures"][name].items())
    options = inspect.signature(HierarchicalTransformer.generate).parameters
    theirs = [name for name, p in options.items() if p.kind is not p.KEYWORD_ONLY]
    assert theirs[1:] == list(ABOUT["signatures"]["generate"])


# inputs on which upstream fails

OPTIONS = training.OPTIONS | dict(seq_len=64, num_rollouts=2)


def build(**options):
    return fill(HierarchicalTransformer(**OPTIONS | options)).to(DEVICE)


def draw(tokens=17, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 31, (batch, tokens), generator=generator).to(DEVICE)


def train(model, ids):
    """The loss, its parts, and the gradients by name."""
    model.zero_grad()
    loss, parts = model(ids, return_loss=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return loss, parts, gradients


def test_what_was_called_before_changes_nothing():
    """Upstream keeps the angles of bf16 for good, and those of a longer sequence."""
    model = build()
    expected = model(draw(20))
    with torch.autocast(DEVICE, torch.bfloat16):
        model(draw(40))
    model(draw(60))
    assert torch.equal(model(draw(20)), expected)


def test_positions_of_half_precision():
    """Positions go past 256, where bf16 has only every second integer."""
    rotary = InterleavedRotary(8).to(DEVICE)
    ones = torch.ones(1, 1, 600, 8, device=DEVICE)
    wide = rotary.rotate_queries_and_keys(ones, ones)
    narrow = rotary.rotate_queries_and_keys(ones.bfloat16(), ones.bfloat16())
    for w, n in zip(wide, narrow, strict=True):
        torch.testing.assert_close(w, n.float(), rtol=1e-6, atol=1e-6)


def test_a_tool_on_rotary_is_called():
    """It is called as upstream's module is, and the numbers are the op's."""
    model, calls = build(), []
    expected = model(draw())
    rotary = model.layers[0][1].attn.rotary_emb
    model.layers[0][1].attn.rotary_emb = type("Other", (InterleavedRotary,), {})(8).to(DEVICE)
    before = InterleavedRotary.rotate_queries_and_keys
    type(model.layers[0][1].attn.rotary_emb).rotate_queries_and_keys = lambda *args: (
        calls.append(1) or before(*args)
    )
    torch.testing.assert_close(model(draw()), expected, rtol=1e-5, atol=1e-5)
    assert calls and rotary is not model.layers[0][1].attn.rotary_emb


def test_copies_and_pickles():
    model = build()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(draw()), model(draw()))
        assert train(other, draw())[0] == train(model, draw())[0]


def test_training_after_inference_mode():
    model = build()
    with torch.inference_mode():
        model(draw(), return_loss=True)
    train(model, draw())


def test_compiles_whole_with_a_loss():
    model = build()
    expected, _, gradients = train(model, draw())
    model.zero_grad()
    loss, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(draw(), return_loss=True)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    expected, _, _ = train(build(), draw())
    for half in (build().to(dtype), build()):
        with torch.autocast(DEVICE, dtype, enabled=half.to_logits.weight.dtype != dtype):
            loss, _, gradients = train(half, draw())
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("weight", [0.0, (0.0, 0.3)], ids=str)
def test_levels_that_weigh_nothing(weight):
    """They are left out, and trained by no optimizer; DistributedDataParallel waits for nothing."""
    summarizer = Convolution(16, 16, 1)
    summarizer.forward = None  # called, it would raise
    model = build(next_latent_loss_weight=weight, chunk_summarizers=(summarizer, None))
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"chunk_summarizers", "latent_dynamics", "layers"}  # frequencies of rotary
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            loss, (_, latent, _, levels) = parallel(draw(), return_loss=True)
            loss.backward()
    finally:
        dist.destroy_process_group()
    assert levels[0] == 0 and (latent > 0) == (levels[1] > 0) == bool(weight)


def test_short_inputs():
    """A level that has no more tokens than rollouts adds 0, a loss without labels is 0."""
    model = build()
    for ids in (draw(2), draw(3), torch.zeros(2, 17, dtype=torch.long, device=DEVICE)):
        loss, (_, latent, _, levels), gradients = train(model, ids)
        assert latent == 0 and not any(levels) and loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert loss == 0
    _, (*_, levels), _ = train(model, draw(5))
    assert levels[0] > 0 and levels[1] == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(rollout_weights=(1.0, -1.0)), ValueError, "rollout_weights must be finite and not"),
        (dict(rollout_weights=(1.0,)), ValueError, "rollout_weights must be 2"),
        (dict(num_rollouts=0), ValueError, "num_rollouts must be at least 1"),
        (dict(next_latent_loss_weight=(1.0,)), ValueError, "next_latent_loss_weight must be one"),
        (dict(next_latent_loss_weight=-1.0), ValueError, "next_latent_loss_weight must be at"),
        (dict(next_latent_loss_type="l1"), ValueError, "next_latent_loss_type must be 'mse_and"),
        (dict(chunk_summarizers=absolute), TypeError, "chunk_summarizers must be Modules"),
        (dict(dynamics_hidden_dim=(8, 8)), TypeError, "dynamics_hidden_dim must be an integer"),
        (dict(dynamics_num_layers=0), ValueError, "dynamics_num_layers must be at least 1"),
        (dict(hierarchical_ar_loss_weight=0.1), TypeError, "hierarchical_ar_loss_weight"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_modules_that_return_something_else():
    reduced = build(next_latent_loss_type=lambda z, y: (z - y).square().mean(-1))
    with pytest.raises(ValueError, match="next_latent_loss_type must return an unreduced loss"):
        train(reduced, draw())
    strided = build(chunk_summarizers=(Convolution(16, 16, 2), None))
    with pytest.raises(ValueError, match="chunk_summarizers must return .* for hierarchy 1"):
        train(strided, draw())


def test_summarizers_in_a_module_list():
    given = torch.nn.ModuleList([Convolution(16, 16, 1), Convolution(16, 8, 2)])
    loss, _, _ = train(build(chunk_summarizers=given), draw())
    assert loss == train(build(chunk_summarizers=list(given)), draw())[0]


def test_heads_of_two_channels_and_small_vocabularies():
    model = build(dim_head=2, num_tokens=7)
    train(model, draw() % 7)
    assert len(model.generate(draw(5) % 7, 20, seed=0).unique()) > 1
    for dtype in (torch.uint8, torch.int32):
        assert model((draw() % 7).to(dtype), return_loss=True)[0] == train(model, draw() % 7)[0]


# ours


def test_tools_on_dynamics_and_summarizers_are_called():
    model, calls = build(), []
    expected = train(model, draw())
    for name in ("latent_dynamics.0.net.3", "chunk_summarizers.1.proj", "latent_dynamics.1"):
        hook = model.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
        found = train(model, draw())
        hook.remove()
        assert name in calls
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_checkpointing_gives_the_same_bits():
    model = build()
    expected = train(model, draw())
    model.checkpointing = True
    torch.testing.assert_close(train(model, draw()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["reference", pytest.param("fused", marks=pytest.mark.gpu)])
def test_steps_in_micro_batches(impl):
    """Loss, all parts and weights are those of the whole batch; on a GPU, by graphs."""
    outputs, weights = [], []
    ids = draw(batch=4)
    ids[:2, 5:] = 0  # does not count
    for accumulate in (1, 2):
        model = build(impl=impl)
        fused = dict(fused=True) if DEVICE == "cuda" else {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **fused)
        step = TrainStep(model, optimizer, precision="fp32", accumulate=accumulate)
        outputs.append([step(ids) for _ in range(3)])
        weights.append([p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu  # graphs are CUDA's
def test_graphs_in_a_loop_give_the_same_bits():
    results = []
    for graphs in (False, True):
        model = build()
        model.graphs = graphs
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for decay in (1.0, 1.0, 1.0, 0.3, 0.3, 0.3):  # which a graph has frozen
            model.dynamic_loss_decay = decay
            loss, parts = model(draw(), return_loss=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append((loss.detach(), parts))
    torch.testing.assert_close(results[:6], results[6:], rtol=0, atol=0)
