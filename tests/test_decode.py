"""A token at a time gives what the whole sequence gives."""

import warnings

import pytest
import torch
from covering import ROWS, TOKENS
from helpers import DEVICE

from shtx import HierarchicalTransformer
from shtx.generation import stages
from shtx.generation.decoder import Decoder


def build(options, **more):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows larger than the sequence
        model = HierarchicalTransformer(**options | more).to(DEVICE).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases start as if they were not there
            p += 0.05 * torch.randn_like(p)
    return model


def last_logits(model, ids):
    with torch.no_grad():
        return torch.stack([model(ids[:, : t + 1])[:, -1] for t in range(ids.shape[1])], dim=1)


def decode(decoder, model, ids, prompt):
    logits = [decoder.prefill(model, ids[:, :prompt]).clone()]
    for t in range(prompt, ids.shape[1]):
        decoder.ids.copy_(ids[:, t])
        logits.append(decoder.step().clone())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_every_position(row, impl, monkeypatch):
    options, _, _ = ROWS[row]
    batch = 1 + row // 2 % 2  # for which there are different kernels
    if row % 2:  # as for a large vocabulary
        monkeypatch.setattr(stages, "TABLE_IDS", 0)
    few = impl == "fused" and DEVICE == "cpu"  # the interpreter takes its time
    model = build(options | dict(depth=1 if few else 2), impl=impl)
    ids = torch.randint(0, options["num_tokens"], (batch, TOKENS), device=DEVICE)
    model.impl = "reference"
    expected = last_logits(model, ids)
    model.impl = impl
    decoder = Decoder(model, batch, TOKENS)
    for prompt, end in [(1, 4), (22, 26)] if few else [(1, TOKENS), (20, TOKENS), (37, TOKENS)]:
        ours = decode(decoder, model, ids[:, :end], prompt)
        torch.testing.assert_close(ours, expected[:, prompt - 1 : end], rtol=1e-4, atol=1e-4)


def test_a_module_that_has_to_be_called():
    """It leaves nothing of a prompt, and a token would read its weights and do no more."""
    options, _, _ = ROWS[0]
    model = build(options)
    decoder = Decoder(model, 1, TOKENS)
    ids = torch.zeros(1, 5, dtype=torch.long, device=DEVICE)
    expected = decoder.prefill(model, ids).clone()
    hook = model.layers[0][0].ff.register_forward_hook(lambda *_: None)
    message = "model must run by its own weights alone, got layers.0.0.ff, which has forward hooks"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs by itself
        with pytest.raises(ValueError, match=message):
            decoder.prefill(model, ids)
    hook.remove()
    assert torch.equal(decoder.prefill(model, ids), expected)


def test_a_block_that_stands_in_two_layers():
    """The rows that it keeps of a prompt belong to the layer, not to the block."""
    options, _, _ = ROWS[0]
    model = build(options | dict(depth=2), impl="reference")
    model.layers[1] = model.layers[0]
    ids = torch.randint(0, options["num_tokens"], (1, 12), device=DEVICE)
    ours = decode(Decoder(model, 1, TOKENS), model, ids, 5)
    expected = last_logits(model, ids)[:, 4:]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_what_a_forward_leaves_for_tokens_to_come(row):
    """Every name once, with the rows of its level."""
    options, _, _ = ROWS[row]
    model = build(options | dict(depth=2), impl="reference")
    ids = torch.zeros(2, 21, dtype=torch.long, device=DEVICE)
    left = []
    plan = model.plan(take=lambda name, x: left.append((name, tuple(x.shape[:2]))))
    with torch.no_grad():
        assert torch.equal(model(ids, plan=plan), model(ids))
    expected = {}
    for layer, blocks in enumerate(model.layers):
        for level, block in enumerate(blocks):
            whats = ["attn", "qkv"] * (block.attn is not None) + ["ff"]
            whats += ["merge"] * model.need_hierarchical_merge
            rows = 2, -(-21 // model.levels[level].stride)
            expected |= {(layer, level, what): rows for what in whats}
    assert len(left) == len(expected) and dict(left) == expected
