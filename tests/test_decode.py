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
