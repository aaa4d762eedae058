"""A small model to sample from, and what it must give."""

import warnings

import torch
from helpers import DEVICE, TWO_LEVELS

from shtx import HierarchicalTransformer

OPTIONS = TWO_LEVELS | dict(dim=(32, 16), depth=2, dim_head=4, seq_len=16)
WINDOWED = OPTIONS | dict(window_sizes=(4, 2))


def build(options=OPTIONS, **more):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows larger than the sequence
        model = HierarchicalTransformer(**options | more).to(DEVICE)
    for p in model.parameters():  # so that greedy tokens vary
        p.data += 0.3 * torch.randn_like(p) * (p.ndim > 1)
    return model


def draw(tokens=5, batch=2, vocabulary=31):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(DEVICE)


def continued(model, rows, count, crop):
    """Greedy tokens (B, count) of whole forwards; crop(rows) is what each of them sees."""
    out = []
    for _ in range(count):
        rows = crop(rows)
        ids = torch.stack([model(row[None])[0, -1].argmax() for row in rows])
        rows = [torch.cat((row, ids[b : b + 1])) for b, row in enumerate(rows)]
        out.append(ids)
    return torch.stack(out, dim=1)
