"""Upstream 0.4.0 is the oracle of shtx.next_latent: arguments, weights, numbers and gradients, from
what tests/next_latent_dumps.py has kept of it.
"""

import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from covering import COUNT
from helpers import DEVICE
from next_latent_dumps import (
    GENERATED,
    PATH,
    SEEDED,
    fill,
    parameters_of,
    project,
    results,
    seeded,
)
from next_latent_dumps import draw as draw_row

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
    for name, added in dict(__init__=["impl"], forward=["loss_reduction", "plan"]).items():
        ours = {
            k: repr(v) for k, v in parameters_of(getattr(HierarchicalTransformer, name)).items()
        }
        for own in added:
            del ours[own]
        assert list(ours.items()) == list(ABOUT["signatures"][name].items())
    options = inspect.signature(HierarchicalTransformer.generate).parameters
    theirs = [name for name, p in options.items() if p.kind is not p.KEYWORD_ONLY]
    assert theirs[1:] == list(ABOUT["signatures"]["generate"])
