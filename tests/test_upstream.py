"""Upstream 0.2.0 is the oracle: same arguments, same weights, same numbers and gradients."""

import inspect
import warnings

import pytest
import torch
from covering import ROWS
from helpers import DEVICE
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream

from shtx import HierarchicalTransformer

RELATIVE = 2e-5  # fp32


def pair(options, impl="reference"):
    """Upstream's model and ours with its weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows larger than the sequence
        theirs = Upstream(**options).to(DEVICE)
        ours = HierarchicalTransformer(**options, impl=impl).to(DEVICE)
    for parameter in theirs.parameters():  # norms start at one and biases near zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def draw(options, tokens, batch=2):
    torch.manual_seed(1)
    return torch.randint(0, options["num_tokens"], (batch, tokens), device=DEVICE)


def assert_same(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    error, size = (ours - theirs).abs().max(), theirs.abs().max()
    assert error <= RELATIVE * size, f"{what}: {error:.1e} off {size:.1e}"


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_same_numbers(row, impl):
    options, tokens, ablate = ROWS[row]
    theirs, ours = pair(options, impl)
    ids = draw(options, tokens)

    # The loss and its gradients come from all of these, and the interpreter takes its time.
    if impl == "reference" or DEVICE == "cuda":
        for name in ("return_hierarchical_token_embeds", "return_hierarchical_embeds"):
            options = {name: True, "ablate_hierarchical_merge": ablate}
            embeds = [m(ids, **options) for m in (ours, theirs)]
            for level, (o, t) in enumerate(zip(*embeds, strict=True)):
                assert_same(o, t, f"{name} of level {level}")
        logits = [m(ids, ablate_hierarchical_merge=ablate) for m in (ours, theirs)]
        assert_same(*logits, "logits")

    results = [m(ids, return_loss=True, ablate_hierarchical_merge=ablate) for m in (ours, theirs)]
    for loss, _ in results:
        loss.backward()
    (loss, parts), (their_loss, their_parts) = results
    assert_same(loss, their_loss, "loss")
    names = ("next token", "reconstruction", "hierarchical autoregressive")
    for name, o, t in zip(names, parts, their_parts, strict=True):
        assert_same(o, t, name)

    for (name, o), (_, t) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert_same(*(torch.zeros_like(p) if p.grad is None else p.grad for p in (o, t)), name)


def test_covers_what_it_says():
    options = [options for options, _, _ in ROWS]
    assert len(ROWS) >= 40
    assert any(o["hierarchy_merge_all"] and max(o["hierarchical_stride"]) > 1
               for o in options if isinstance(o["hierarchical_stride"], tuple))  # fmt: skip
    assert any(isinstance(o["dim"], tuple) and any(d % 2 for d in o["dim"]) for o in options)
    assert any(o["predict_hierarchy"] not in (None, 1) for o in options)


@pytest.mark.parametrize("row", [0, 7, 21])
def test_checkpoints_in_four_directions(row):
    """Upstream's and ours, reference's and fused's: the same keys in the same order, strict."""
    options, tokens, _ = ROWS[row]
    theirs, ours = pair(options)
    fused = HierarchicalTransformer(**options, impl="fused").to(DEVICE)
    for parameter in ours.parameters():
        parameter.data.mul_(1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    fused.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(fused.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [t.shape for t in ours.state_dict().values()] == [
        t.shape for t in theirs.state_dict().values()
    ]
    ids = draw(options, tokens)
    assert_same(ours(ids), theirs(ids), "reference")
    assert_same(fused(ids), theirs(ids), "fused")


def test_same_arguments_and_defaults():
    theirs = inspect.signature(Upstream.__init__).parameters
    ours = dict(inspect.signature(HierarchicalTransformer.__init__).parameters)
    assert ours.pop("impl").default == "auto"
    assert {k: v.default for k, v in ours.items()} == {k: v.default for k, v in theirs.items()}
    theirs, ours = (
        inspect.signature(m.forward).parameters for m in (Upstream, HierarchicalTransformer)
    )
    ours = [(p.name, p.default) for p in ours.values()]
    assert ours[-3:] == [("loss_reduction", "mean"), ("labels", None), ("plan", None)]
    del ours[-3:]
    assert ours == [(p.name, p.default) for p in theirs.values()]
    # upstream's generate hides its own behind a decorator
    options = inspect.signature(HierarchicalTransformer.generate).parameters
    theirs = [name for name, p in options.items() if p.kind is not p.KEYWORD_ONLY]
    assert theirs[1:] == ["prompt", "seq_len", "temperature", "filter_thres", "kwargs"]
    assert options["temperature"].default == 1.0 and options["filter_thres"].default == 0.9


def test_a_seed_gives_upstreams_initial_weights():
    options, _, _ = ROWS[3]
    models = []
    for model in (Upstream, HierarchicalTransformer):
        torch.manual_seed(5)
        models.append(model(**options).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(m.values() for m in models), strict=True))


@pytest.mark.parametrize("row", [0, 5, 9])
def test_a_seed_generates_upstreams_tokens(row):
    options = {**ROWS[row][0], "num_tokens": 40}
    theirs, ours = pair(options)
    prompt = draw(options, 5)
    samples = []
    for model, options in ((theirs, {}), (ours, dict(use_cache=False))):
        torch.manual_seed(3)
        samples.append(model.generate(prompt, 9, temperature=0.7, filter_thres=0.8, **options))
    assert samples[0].shape == (2, 9) and torch.equal(*samples)
