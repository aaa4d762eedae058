"""Random models: against upstream in fp64, fused against reference, cached against uncached."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from random import Random

import torch
from covering import FACTORS, TOKENS, build
from helpers import DEVICE
from test_upstream import draw, pair
from torch import Tensor
from torch.nn import Module

from shtx import HierarchicalTransformer
from tests.campaign import Case

SLACK = 3  # times what eager PyTorch is off in the same dtype
NUDGES = 16
LARGEST = 1e-4  # difference, relative to the largest number of a tensor


def configuration(random: Random) -> tuple[dict, int, bool]:
    """Arguments of a model, tokens, whether the merge is ablated. Wider than what the tests cover
    in pairs: any levels in any order, any widths and windows."""
    while True:
        row = {name: random.choice(values) for name, values in FACTORS.items()}
        levels = random.sample([1, 2, 4, 8, 16, 32], random.randrange(1, 5))
        row |= dict(
            hierarchies=tuple(levels),
            dim_head=random.choice([2, 4, 6, 8, 10, 16]),
            heads=random.randrange(1, 5),
            ff_mult=random.choice([1, 1.5, 2.7, 4]),
            # at least two are of the longest level: upstream's loss of one is NaN
            tokens=random.randrange(34, TOKENS + 1),
        )
        if (options := build(row | dict(window="none", dim="equal"))) is None:
            continue
        options |= dict(
            # upstream's token shift has to halve a width
            dim=tuple(random.choices(range(2, 40), k=len(levels))),
            window_sizes=tuple(random.choices([None, 0, *range(1, 12), 100], k=len(levels))),
            depth=random.randrange(1, 4),
            num_tokens=random.randrange(6, 40),
        )
        return options, row["tokens"], row["ablate"]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest number; NaN where either has one."""
    if not theirs.numel():
        return 0.0
    size, error = theirs.abs().max().item(), (ours.double() - theirs.double()).abs().max().item()
    return error / size if size else error


def results(model, ids: Tensor, ablate: bool) -> Iterator[tuple[str, Tensor]]:
    """Logits, losses, and gradients of all weights."""
    yield "logits", model(ids, ablate_hierarchical_merge=ablate)
    loss, parts = model(ids, return_loss=True, ablate_hierarchical_merge=ablate)
    yield "loss", loss
    yield from ((f"loss {i}", part) for i, part in enumerate(parts))
    loss.backward()
    for name, p in model.named_parameters():
        yield f"gradient of {name}", torch.zeros_like(p) if p.grad is None else p.grad


def nudged(model: Module, seed: int) -> Module:
    """A copy whose weights are two units in the last place off, so that all it adds rounds anew."""
    generator, copy = torch.Generator().manual_seed(seed), deepcopy(model)
    for p in copy.parameters():
        signs = 2 * torch.randint(2, p.shape, generator=generator).to(p) - 1
        p.data *= 1 + 2 * torch.finfo(p.dtype).eps * signs
    return copy


def compare(models: Callable, numbers: range, seed: str) -> Iterator[Case]:
    """`models(options)` are ours, the one that it is to be like, and one that may be as far off,
    as it rounds once, or, where that is not enough, in any of NUDGES other ways.
    """
    for number in numbers:
        options, tokens, ablate = configuration(Random(f"{seed} {number}"))
        finding, largest, ill = None, 0.0, 0
        try:
            with redirect_stdout(io.StringIO()):  # upstream prints its warnings
                all_three = models(options)
            ids = draw(options, tokens)
            ours, theirs, other = (list(results(model, ids, ablate)) for model in all_three)
            far = lambda found, theirs=theirs: [
                difference(x, y) for (_, x), (_, y) in zip(found, theirs, strict=True)
            ]
            off, others = far(ours), far(other)
            for nudge in range(NUDGES + 1):
                allowed = [max(LARGEST, SLACK * error) for error in others]
                farther = [i for i, limit in enumerate(allowed) if not off[i] <= limit]
                if not farther or nudge == NUDGES:
                    break
                others = [*map(max, others, far(results(nudged(all_three[2], nudge), ids, ablate)))]
            if farther:
                i = farther[0]
                finding = f"{ours[i][0]} is off by {off[i]:.1e}, not by {others[i]:.1e}"
            largest, ill = max(off), sum(LARGEST < error for error in off)
        except Exception as error:
            finding = f"{type(error).__name__}: {error}"
        figures = {
            "largest relative difference": largest,
            f"tensors above {LARGEST}, as ill-conditioned in upstream's fp32": ill,
        }
        what = f"{options}, {tokens} tokens, ablate={ablate}"
        yield Case(finding and f"{what}: {finding}", figures)


def upstream(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """The reference against simple-hierarchical-transformer, both in fp64."""

    def models(options: dict):
        theirs, ours = pair(options)
        theirs = theirs.double()
        return ours.double(), theirs, deepcopy(theirs)

    return compare(models, numbers, seed)


def fused(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Fused ops in fp32, on a CPU by Triton's interpreter, against the reference in fp64."""

    def models(options: dict):
        theirs, ours = pair(options, "fused")
        return ours, deepcopy(theirs).double(), theirs

    return compare(models, numbers, seed)


def cached(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Greedy tokens with the cache, for as long as the model sees all, and without it."""
    for number in numbers:
        random = Random(f"{seed} {number}")
        options, _, _ = configuration(random)
        finding, model = None, make(options)
        prompt = draw(options, random.randrange(1, 20))
        length = TOKENS - prompt.shape[1]
        try:
            tokens, expected = (
                model.generate(prompt, length, temperature=0, use_cache=use)
                for use in (True, False)
            )
            finding = unlike(model, prompt, tokens, expected)
        except Exception as error:
            finding = f"{type(error).__name__}: {error}"
        yield Case(finding and f"{options}, prompt of {prompt.shape[1]}: {finding}")


def make(options: dict) -> HierarchicalTransformer:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows larger than the sequence
        model = HierarchicalTransformer(**options, impl="reference").to(DEVICE).double()
    for p in model.parameters():  # so that greedy tokens vary
        p.data += 0.3 * torch.randn_like(p)
    return model


def unlike(model, prompt: Tensor, tokens: Tensor, expected: Tensor) -> str | None:
    """Name the first difference. Of tokens that are equally likely, either may be taken."""
    for row, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)):
        different = (ours != theirs).nonzero()
        if len(different) == 0:
            continue
        at = different[0].item()
        logits = model(torch.cat((prompt[row], theirs[:at]))[None])[0, -1]
        gap = (logits[theirs[at]] - logits[ours[at]]) / logits.abs().max()
        if gap > LARGEST:
            return f"token {at} of row {row} is {ours[at]}, not {theirs[at]}, by {gap:.1e}"
    return None
