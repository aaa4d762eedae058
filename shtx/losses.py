"""The losses of a model: the one place that knows their order, and what each is over.

Every loss is a mean, sum / count, so that sums and counts of several batches add up to the mean
over all of them. A model lists what it has as terms. In their order are the columns of
`loss_reduction="sum"`, of `model.loss_weights` and of `model.loss_counts`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from shtx.ops import cosine_distance, cross_entropy, windows
from shtx.plan import Plan

LEFT_OUT = -100  # a label, besides ignore_index: what PyTorch's losses leave out by default

Pair = tuple[Tensor, Tensor]  # sum and count: 0-dim, or one for each column of a term


class Term(NamedTuple):
    """One loss of a model.

    Attributes:
        loss: a class of this page, which computes it.
        weight: in the loss of the model.
        level: whose; None: of the model as a whole.
        columns: how many means it is the sum of.
    """

    loss: type
    weight: float
    level: int | None = None
    columns: int = 1


class Inputs(NamedTuple):
    """Holds what losses are computed from.

    Attributes:
        ids: (B, N) that were read.
        labels: (B, N), of which each follows on its id; those of ignore_index are left out.
        predicting: (B, N, D), what logits are made of.
        embeds: the levels as they leave the last layer, normalized.
        token_embeds: (B, N, D) embeddings of ids; None where no module had to be called for them.
    """

    ids: Tensor
    labels: Tensor
    predicting: Tensor
    embeds: list[Tensor]
    token_embeds: Tensor | None


class NextToken:
    """Cross entropy of every label given the tokens before it. No other loss reads labels."""

    @staticmethod
    def count(model: Module, term: Term, ids: Tensor, labels: Tensor) -> Tensor:
        return (labels != model.ignore_index).sum()

    @staticmethod
    def run(model: Module, term: Term, inputs: Inputs, plan: Plan) -> Pair:
        labels, options = inputs.labels, dict(ignore_index=model.ignore_index, reduction="sum")
        if plan.reads(model.to_logits):
            args = inputs.predicting, model.to_logits.weight, labels
            return plan.ops.linear_cross_entropy(*args, **options)
        return cross_entropy(model.to_logits(inputs.predicting), labels, **options)


class Reconstruction:
    """Cross entropy of the tokens behind a level's, given it. Id 0 is never counted."""

    @staticmethod
    def count(model: Module, term: Term, ids: Tensor, labels: Tensor) -> Tensor:
        level = model.levels[term.level]
        return (windows(ids, level.compress, level.stride) != 0).sum()

    @staticmethod
    def run(model: Module, term: Term, inputs: Inputs, plan: Plan) -> Pair:
        h = inputs.embeds[term.level]
        return model.compressors[term.level].recon(h, inputs.ids, plan, reduction="sum")


class HierarchicalAR:
    """Cosine distance of what a level predicts to be its next token, and that token."""

    @staticmethod
    def count(model: Module, term: Term, ids: Tensor, labels: Tensor) -> Tensor:
        successors = (ids.shape[1] - 1) // model.levels[term.level].stride
        return ids.new_full((), len(ids) * successors)

    @staticmethod
    def run(model: Module, term: Term, inputs: Inputs, plan: Plan) -> Pair:
        h, predict = inputs.embeds[term.level], model.to_hierarchical_preds[term.level]
        if plan.reads(predict):
            args = h, predict.weight, predict.bias
            return plan.ops.hierarchical_ar_loss(*args, reduction="sum")
        return cosine_distance(predict(h)[:, :-1], h, reduction="sum")


def run(model: Module, inputs: Inputs, plan: Plan) -> list[Pair]:
    """Sum and count of every term."""
    if inputs.predicting.shape[1] != inputs.labels.shape[1]:
        raise ValueError(
            "ids must have one prediction a token for return_loss, got"
            f" {inputs.predicting.shape[1]} predictions for {inputs.labels.shape[1]} tokens:"
            " hierarchical_stride must be 1 for some hierarchy"
        )
    terms, pairs = model.terms, {}

    # gradients of weights are made here, and stay until backward: the largest come first, so
    # that what it takes to make them is not on top of the others
    whose = lambda i: -1 if terms[i].level is None else terms[i].level
    for i in sorted(range(len(terms)), key=whose, reverse=True):
        pairs[i] = terms[i].loss.run(model, terms[i], inputs, plan)
    return [pairs[i] for i in range(len(terms))]


def columns(pairs: list[Pair]) -> Pair:
    """Sums (L,) and counts (L,) of all columns."""
    sums, counts = zip(*pairs, strict=True)
    return torch.cat([s.reshape(-1) for s in sums]), torch.cat([c.reshape(-1) for c in counts])


def weights(terms: list[Term]) -> list[float]:
    """The weight of every column."""
    return [term.weight for term in terms for _ in range(term.columns)]


def counts(model: Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The counts (L,) of all columns."""
    each = (term.loss.count(model, term, ids, labels) for term in model.terms)
    return torch.cat([count.reshape(-1) for count in each])


def means(pairs: list[Pair]) -> list[Tensor]:
    """The value of every term: 0 where nothing counts."""
    values = (total / count.clamp(min=1) for total, count in pairs)
    return [value.sum() if value.ndim else value for value in values]


def means_of_columns(terms: list[Term], columns: Tensor) -> list[Tensor]:
    """The value of every term, of the means (L,) of all columns."""
    return [column.sum() for column in columns.split([term.columns for term in terms])]


class Part(NamedTuple):
    """Holds what all terms of one loss come to."""

    value: Tensor  # their sum
    weighted: Tensor  # what it adds to the loss of the model
    terms: dict[int | None, Tensor]  # by level


def combine(terms: list[Term], values: list[Tensor]) -> tuple[Tensor, dict[type, Part]]:
    """The loss of a model, and what each of its losses has in it.

    Args:
        terms, values: as many of each.
    """
    groups = {}
    for term, value in zip(terms, values, strict=True):
        groups.setdefault(term.loss, []).append((term, value))
    parts = {loss: _part(group) for loss, group in groups.items()}
    return sum(part.weighted for part in parts.values()), parts


def _part(pairs: list[tuple[Term, Tensor]]) -> Part:
    value = sum(value for _, value in pairs)
    by_level = {term.level: value for term, value in pairs}
    weight = pairs[0][0].weight
    if all(term.weight == weight for term, _ in pairs):
        return Part(value, value if weight == 1 else value * weight, by_level)
    return Part(value, sum(value * term.weight for term, value in pairs), by_level)
