"""The hierarchical transformer under the interface and checkpoint format of
simple-hierarchical-transformer 0.4.0, whose levels learn to foretell their own latents.

The trunk is that of model.py. What is new is one loss (NextLat, arXiv 2511.05963): from a level's
embedding and a summary of the tokens that come next, an MLP tells the next embedding, and from that
the one after it, `num_rollouts` times.
"""

import math

import torch
from torch import Tensor, cat, nn
from torch.nn import Module, ModuleList

from shtx import losses
from shtx.layers import dense
from shtx.levels import Level, integer, number, per_level
from shtx.losses import Inputs, NextToken, Pair, Reconstruction, Term
from shtx.model import Trunk
from shtx.ops import DISTANCES, chunk_means, rollouts
from shtx.plan import Layer, Plan


class CausalChunkSummarizer(Layer):
    """A linear layer, if widths differ, of the mean of the embeddings behind a level token."""

    cast_by_ops = ("proj",)

    def __init__(self, level: Level, dim_embed: int):
        super().__init__()
        self.level = level
        same = dim_embed == level.dim
        self.proj = nn.Identity() if same else nn.Linear(dim_embed, level.dim)
        self.remember()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) embeddings of tokens to (B, M, d) of the level."""
        return self.proj(chunk_means(x, self.level.compress, self.level.stride))

    def is_read(self, plan: Plan) -> bool:
        """Return whether `run` does what `forward` does, of a summarizer that is plain itself."""
        return plan.reads(self.proj)

    def run(self, ids: Tensor, embedding: Tensor, plan: Plan) -> Tensor:
        """(B, N) ids, (V, D) embedding to (B, M, d)."""
        weights = (getattr(self.proj, name, None) for name in ("weight", "bias"))
        sizes = dict(compress=self.level.compress, stride=self.level.stride)
        return plan.ops.chunk_summary(ids, embedding, *weights, **sizes)


class LatentDynamics(Layer):
    """Predicts the next latent from a latent and a summary of the tokens that come next. It begins
    as the identity.
    """

    def __init__(self, dim: int, hidden_dim: int | None, num_layers: int):
        super().__init__()
        hidden = [dim if hidden_dim is None else hidden_dim] * (num_layers - 1)
        sizes = [2 * dim, *hidden, dim]
        self.net = nn.Sequential(nn.LayerNorm(2 * dim))
        for i in range(num_layers):
            if i:
                self.net.append(nn.GELU())
            self.net.append(nn.Linear(sizes[i], sizes[i + 1]))
        self.begin_as_identity()
        self.cast_by_ops = tuple(f"net.{i}" for i in range(1, len(self.net), 2))
        self.remember()

    def begin_as_identity(self):
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, summary: Tensor, z: Tensor) -> Tensor:
        """(B, K, d) each: the summaries of what comes next, and the latents."""
        return z + self.net(cat((z, summary), dim=-1).to(summary.dtype))

    @property
    def weights(self) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
        """Weight and bias of the norm, and of each linear layer."""
        norm, *linear = ((m.weight, m.bias) for m in self.net if not isinstance(m, nn.GELU))
        return norm, linear


class NextLatent:
    """The loss of one level: the distance of its foretold latents from those that came."""

    @staticmethod
    def valid(model: Module, term: Term, ids: Tensor) -> Tensor:
        """(B, M): whether the last token of each level token counts."""
        return ids[:, :: model.levels[term.level].stride] != model.ignore_index

    @staticmethod
    def count(model: Module, term: Term, ids: Tensor, labels: Tensor) -> Tensor:
        valid = NextLatent.valid(model, term, ids)
        K = max(0, valid.shape[1] - model.num_rollouts)
        return torch.stack([valid[:, r : r + K].sum() for r in range(1, model.num_rollouts + 1)])

    @staticmethod
    def run(model: Module, term: Term, inputs: Inputs, plan: Plan) -> Pair:
        h, dynamics = inputs.embeds[term.level], model.latent_dynamics[term.level]
        args = (
            h,
            model.summarize(term.level, inputs, plan),
            NextLatent.valid(model, term, inputs.ids),
        )
        decay = model.dynamic_loss_decay if model.dynamic_rollout_loss_weight else None
        steps, kind = model.rollout_loss_weights, model.next_latent_loss_type
        if kind is not None and plan.reads(dynamics) and plan.reads_all(dynamics.net):
            options = dict(distance=kind, decay=decay)
            return plan.ops.next_latent_loss(*args, *dynamics.weights, steps, **options)
        distance = model.custom_distance if kind is None else DISTANCES[kind]
        return rollouts(*args, dynamics, distance, steps, decay)


class HierarchicalTransformer(Trunk):
    """A causal language model over several compressed copies of its sequence.

    Arguments, defaults, returns and checkpoints are those of simple-hierarchical-transformer
    0.4.0. Those of `shtx.HierarchicalTransformer` are as there, but for its
    hierarchical_ar_loss_weight; an argument marked * is one value, or a tuple or list with one for
    each of `hierarchies`.

    Args:
        next_latent_loss_weight: * of the loss of a level's foretold latents. A level of weight 0 is
            left out: its dynamics and summarizer are not trained.
        next_latent_loss_type: "mse_and_cosine_sim", "mse", "smooth_l1", or a callable, such as a
            Module, of foretold and actual latents (B, K, d) to their unreduced loss (B, K, d).
        num_rollouts: R, how many latents are foretold one after the other; a level that has no more
            than R tokens adds 0.
        chunk_summarizers: None, or * a Module of token embeddings (B, N, D) to causal summaries (B,
            ceil(N / stride), dim); None: the mean of a level token's chunk, projected.
        detach_summaries: whether summaries train themselves, but not the token embedding.
        dynamics_hidden_dim: inner width of all dynamics; None: that of the level.
        dynamics_num_layers: linear layers of the dynamics.
        dynamic_rollout_loss_weight: weigh what is foretold after a bad guess less.
        dynamic_loss_decay: by exp(-decay (loss of the guesses before)).
        rollout_weights: R numbers, which are normalized; None: all alike.

    Attributes, Raises: as of `shtx.HierarchicalTransformer`.
    """

    version = "0.4.0"
    is_interleaved = True
    made_in_turns = (*Trunk.made_in_turns, ("chunk_summarizers", "latent_dynamics"))

    def __init__(
        self,
        *,
        num_tokens,
        dim,
        depth,
        seq_len=2048,
        dim_head=64,
        heads=8,
        ff_mult=4,
        hierarchies=1,
        window_sizes=None,
        hierarchical_stride=1,
        hierarchy_merge_all=False,
        predict_hierarchy=None,
        predict_use_all_hierarchy=False,
        recon_loss_weight=0.1,
        next_latent_loss_weight=0.25,
        next_latent_loss_type="mse_and_cosine_sim",
        num_rollouts=1,
        chunk_summarizers=None,
        detach_summaries=True,
        dynamics_hidden_dim=None,
        dynamics_num_layers=3,
        dynamic_rollout_loss_weight=True,
        dynamic_loss_decay=1.0,
        rollout_weights=None,
        ignore_index=0,
        use_flash_attn=False,
        impl="auto",
    ):
        super().__init__()
        num_tokens = self.set_options(
            num_tokens=num_tokens,
            seq_len=seq_len,
            hierarchies=hierarchies,
            hierarchical_stride=hierarchical_stride,
            dim=dim,
            dim_head=dim_head,
            heads=heads,
            window_sizes=window_sizes,
            ff_mult=ff_mult,
            hierarchy_merge_all=hierarchy_merge_all,
            predict_hierarchy=predict_hierarchy,
            predict_use_all_hierarchy=predict_use_all_hierarchy,
            recon_loss_weight=recon_loss_weight,
            ignore_index=ignore_index,
        )
        self.detach_summaries = bool(detach_summaries)
        self.dynamic_rollout_loss_weight = bool(dynamic_rollout_loss_weight)
        self.dynamic_loss_decay = number("dynamic_loss_decay", dynamic_loss_decay)
        self.num_rollouts = integer("num_rollouts", num_rollouts, at_least=1)
        name, count = "next_latent_loss_weight", len(self.levels)
        weights = per_level(name, next_latent_loss_weight, count)
        self.next_latent_loss_weight = tuple(number(name, weight) for weight in weights)
        self.has_next_latent_loss = any(self.next_latent_loss_weight)

        self.token_emb = nn.Embedding(num_tokens, max(self.dims))
        self.make_compressors(num_tokens)
        # a Module has its place among the keys of a checkpoint here
        is_custom = callable(check_loss_type(next_latent_loss_type))
        self.next_latent_loss_type = None if is_custom else next_latent_loss_type
        self.next_latent_loss_fn = next_latent_loss_type if is_custom else None
        self.rollout_weights = None if rollout_weights is None else list(rollout_weights)
        steps = normalized(self.rollout_weights, self.num_rollouts)
        self.register_buffer("rollout_loss_weights", steps, persistent=False)
        self.make_dynamics(chunk_summarizers, dynamics_hidden_dim, dynamics_num_layers)
        self.make_layers(num_tokens, depth, impl)

    def make_dynamics(self, summarizers, hidden_dim, num_layers):
        """Make summarizers and dynamics; those that only levels of weight 0 have are frozen, so
        that neither an optimizer nor DistributedDataParallel waits for their gradients.
        """
        if hidden_dim is not None:
            hidden_dim = integer("dynamics_hidden_dim", hidden_dim, at_least=1)
        num_layers = integer("dynamics_num_layers", num_layers, at_least=1)
        if isinstance(summarizers, ModuleList):
            summarizers = list(summarizers)
        self.chunk_summarizers, self.latent_dynamics = ModuleList(), ModuleList()
        given = per_level("chunk_summarizers", summarizers, len(self.levels))
        for level, summarizer in zip(self.levels, given, strict=True):
            if summarizer is None:
                summarizer = CausalChunkSummarizer(level, max(self.dims))
            if not isinstance(summarizer, Module):
                raise TypeError(f"chunk_summarizers must be Modules or None, got {summarizer!r}")
            self.chunk_summarizers.append(summarizer)
            self.latent_dynamics.append(LatentDynamics(level.dim, hidden_dim, num_layers))
        both = list(zip(self.chunk_summarizers, self.latent_dynamics, strict=True))
        used = {m for i, pair in enumerate(both) if self.next_latent_loss_weight[i] for m in pair}
        for module in {m for pair in both for m in pair} - used:
            module.requires_grad_(False)

    def init_weights(self) -> None:
        super().init_weights()
        for dynamics in self.latent_dynamics:
            dynamics.begin_as_identity()
        self.rollout_loss_weights.copy_(normalized(self.rollout_weights, self.num_rollouts))

    def summarize(self, level: int, inputs: Inputs, plan: Plan) -> Tensor:
        """(B, M, d): what a level's dynamics are told of the tokens that come next."""
        summarizer, emb = self.chunk_summarizers[level], self.token_emb
        detach = Tensor.detach if self.detach_summaries else lambda t: t
        is_default = isinstance(summarizer, CausalChunkSummarizer)
        if is_default and plan.reads(summarizer, emb) and summarizer.is_read(plan):
            return summarizer.run(inputs.ids, detach(emb.weight), plan)
        x = inputs.token_embeds
        if x is None:
            x = plan.ops.token_embedding(inputs.ids, emb.weight)
        summaries, shape = dense(summarizer(detach(x))), inputs.embeds[level].shape
        if summaries.shape != shape:
            raise ValueError(
                f"chunk_summarizers must return (B, ceil(N / stride), dim) {tuple(shape)} for"
                f" hierarchy {self.hierarchies[level]}, got {tuple(summaries.shape)}"
            )
        return summaries

    def custom_distance(self, z: Tensor, y: Tensor) -> Tensor:
        """(B, K) of the loss that was given as next_latent_loss_type."""
        loss = self.next_latent_loss_fn(z, y)
        if loss.shape != z.shape:
            raise ValueError(
                f"next_latent_loss_type must return an unreduced loss {tuple(z.shape)},"
                f" got {tuple(loss.shape)}"
            )
        return loss.mean(dim=-1)

    @property
    def terms(self) -> list[Term]:
        weights = enumerate(self.next_latent_loss_weight)
        latent = [Term(NextLatent, w, i, self.num_rollouts) for i, w in weights if w > 0]
        return [Term(NextToken, 1.0), *self.recon_terms(), *latent]

    @property
    def options(self) -> tuple:
        own = self.next_latent_loss_type, id(self.next_latent_loss_fn), self.detach_summaries
        return *super().options, *own, self.dynamic_rollout_loss_weight, self.dynamic_loss_decay

    def combine(self, values: list[Tensor]) -> tuple[Tensor, tuple]:
        loss, parts = losses.combine(self.terms, values)
        none = values[0].new_zeros(())
        none = losses.Part(none, none, {})
        ce, recon, latent = (
            parts.get(kind, none) for kind in (NextToken, Reconstruction, NextLatent)
        )
        levels = tuple(latent.terms.get(i, none.value) for i in range(len(self.levels)))
        return loss, (ce.value, latent.weighted, recon.value, levels)

    def forward(
        self,
        ids,
        return_loss=False,
        return_hierarchical_token_embeds=False,
        return_hierarchical_embeds=False,
        return_logits_and_embeds=False,
        ablate_hierarchical_merge=False,
        loss_reduction="mean",
        *,
        labels=None,
        plan=None,
    ):
        """Logits, or the loss of predicting each token from those before it.

        Args, Raises: as of `shtx.HierarchicalTransformer`, and
            return_logits_and_embeds: return both, with return_loss those of all ids but the last.

        Returns:
            as there, but the parts of the loss are next token, next latent (weighted),
            reconstruction, and a tuple of the next-latent loss of each level (not weighted); or (B,
            N, V) logits and the levels as they leave the last layer.
        """
        return self.run(
            ids,
            return_loss=return_loss,
            return_hierarchical_token_embeds=return_hierarchical_token_embeds,
            return_hierarchical_embeds=return_hierarchical_embeds,
            return_logits_and_embeds=return_logits_and_embeds,
            ablate_hierarchical_merge=ablate_hierarchical_merge,
            loss_reduction=loss_reduction,
            labels=labels,
            plan=plan,
        )


def check_loss_type(kind):
    if not callable(kind) and kind not in DISTANCES:
        names = ", ".join(map(repr, DISTANCES))
        raise ValueError(f"next_latent_loss_type must be {names} or a callable, got {kind!r}")
    return kind


def normalized(weights, count: int) -> Tensor:
    """The weights of rollouts, which add up to 1, or an error that names them."""
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"rollout_weights must be {count} (num_rollouts), got {len(values)}")
    if not math.isfinite(total := sum(values)) or total == 0:
        raise ValueError(f"rollout_weights must be finite and not add up to 0, got {weights}")
    steps = torch.tensor(values)
    return steps / steps.sum()
