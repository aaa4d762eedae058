"""The hierarchical transformer, under the interface and checkpoint format of
simple-hierarchical-transformer 0.2.0. That of 0.4.0 is in next_latent.py, on the same trunk.

Several copies of the sequence, the levels, run side by side, each compressed by a causal
convolution and each with its own transformer blocks. After every layer they are merged into the
level that predicts the next token.
"""

import warnings
from collections.abc import Iterator
from itertools import zip_longest
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import Linear, Module, ModuleList
from torch.utils.checkpoint import checkpoint

from shtx import losses, ops
from shtx.checks import check_ids, check_labels
from shtx.generation import generate
from shtx.graphed_loss import replay
from shtx.initial import draw
from shtx.layers import (
    Compress,
    FeedForward,
    HierarchicalBlock,
    HierarchicalMerge,
    add,
    dense,
    end_norm,
    exists,
    whole,
)
from shtx.levels import integer, make_levels, number
from shtx.losses import HierarchicalAR, NextToken, Reconstruction, Term
from shtx.ops import REFERENCE
from shtx.plan import Layer, Plan, Take, make_plan, unfused
from shtx.versions import refuse_other_version


class Trunk(Layer):
    """Holds what models of every interface share: all but arguments, returns and losses.

    A subclass makes its modules in the order of its upstream, so that a seed gives upstream's
    initial weights: `set_options`, `token_emb`, `make_compressors`, `make_layers`, its losses' own
    in between.

    Attributes:
        version: of simple-hierarchical-transformer, whose interface and checkpoints it has.
        terms: the losses, see losses.py.
        is_interleaved: whether rotary pairs neighbouring channels in full attention.
        made_in_turns: lists of modules that a constructor fills side by side.
    """

    version: str
    terms: list[Term]
    is_interleaved = False
    made_in_turns = (("layers", "hierarchical_merges"),)

    def set_options(
        self,
        *,
        num_tokens,
        seq_len,
        hierarchy_merge_all,
        predict_hierarchy,
        predict_use_all_hierarchy,
        recon_loss_weight,
        ignore_index,
        **columns,
    ) -> int:
        """Check and keep what all models are told; return num_tokens."""
        self.checked = False
        self.checkpointing = False
        self.graphs = False
        self._num_tokens = num_tokens = integer("num_tokens", num_tokens, at_least=1)
        self.seq_len = integer("seq_len", seq_len, at_least=1)
        self.ignore_index = integer("ignore_index", ignore_index)
        self.recon_loss_weight = number("recon_loss_weight", recon_loss_weight)
        self.should_recon = recon_loss_weight > 0
        self.hierarchy_merge_all = hierarchy_merge_all
        self.predict_use_all_hierarchy = predict_use_all_hierarchy

        self.levels = levels = make_levels(
            **columns, seq_len=self.seq_len, interleaved=self.is_interleaved
        )
        self.hierarchies = tuple(level.compress for level in levels)
        self.h_strides = tuple(level.stride for level in levels)
        self.dims = tuple(level.dim for level in levels)
        self.predict_hierarchy_index = self.index_of(predict_hierarchy)
        self.need_hierarchical_merge = len(levels) > 1
        return num_tokens

    def make_compressors(self, num_tokens: int):
        self.compressors = ModuleList(
            Compress(level, max(self.dims), num_tokens, should_recon=self.should_recon)
            for level in self.levels
        )

    def make_layers(self, num_tokens: int, depth, impl: str):
        """Make the norms, the layers and the head, which end a constructor."""
        levels, dims = self.levels, self.dims
        predicting = levels[self.predict_hierarchy_index]
        self.post_token_emb_norms = ModuleList(nn.LayerNorm(d) for d in dims)

        self.layers = ModuleList()
        self.hierarchical_merges = ModuleList()
        for _ in range(integer("depth", depth, at_least=0)):
            self.layers.append(ModuleList(HierarchicalBlock(level) for level in levels))
            if self.need_hierarchical_merge:
                dim_out = sum(dims) if self.hierarchy_merge_all else predicting.dim
                self.hierarchical_merges.append(HierarchicalMerge(levels, dim_out))

        self.norms = ModuleList(nn.LayerNorm(d) for d in dims)
        dim_logits = sum(dims) if self.predict_use_all_hierarchy else predicting.dim
        self.to_logits = Linear(dim_logits, num_tokens, bias=False)
        self.remember()
        self.kept_slopes = 0.7
        # equal in all processes: if DistributedDataParallel wrote them every step, they would have
        # to be read again every step
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.impl = impl
        self._told = False  # whether a warning has named its modules that run unfused

    def init_weights(self) -> None:
        """Give all parameters and buffers the values of a new model, wherever they are.

        A model that was made on meta needs `to_empty` before. PyTorch's generator of the CPU draws
        the numbers that a constructor there draws from the same seed, a module at a time; of what
        FSDP2 has sharded, every process keeps its part, and all of them need the same seed.

        Raises:
            TypeError: for a module of other making that has no reset_parameters.
        """
        for module in self.in_order_made():
            draw(module)

    def in_order_made(self) -> Iterator[Module]:
        """The modules below, in the order in which a constructor makes them."""
        for name, child in self.named_children():
            lists = next((names for names in self.made_in_turns if name in names), (name,))
            if len(lists) == 1:
                yield from child.modules()
            elif name == lists[0]:
                for turn in zip_longest(*map(self.get_submodule, lists)):
                    for made in filter(exists, turn):
                        yield from made.modules()

    generate = generate
    check_ids, check_labels = check_ids, check_labels
    cast_by_ops = ("to_logits",)  # and a vocabulary at a time, in losses

    def index_of(self, predict_hierarchy: int | None) -> int:
        compressions = list(self.hierarchies)
        predict_hierarchy = min(compressions) if predict_hierarchy is None else predict_hierarchy
        if predict_hierarchy not in compressions:
            raise ValueError(
                f"predict_hierarchy must be one of hierarchies, {compressions},"
                f" got {predict_hierarchy}"
            )
        index = compressions.index(predict_hierarchy)
        stride = self.h_strides[index]
        if stride != 1 and not self.hierarchy_merge_all:
            raise ValueError(
                f"hierarchical_stride must be 1 for the predicting hierarchy, {predict_hierarchy},"
                f" unless hierarchy_merge_all, got {stride}"
            )
        return index

    @property
    def impl(self) -> str:
        return self._impl

    @impl.setter
    def impl(self, impl: str):
        self._impl = ops.check_impl(impl)
        for module in self.modules():
            if isinstance(module, Layer) and module is not self:
                module.impl = impl

    @property
    def kept_slopes(self) -> float:
        return self._kept_slopes

    @kept_slopes.setter
    def kept_slopes(self, share: float):
        if number("kept_slopes", share) > 1:
            raise ValueError(f"kept_slopes must be at most 1, got {share}")
        self._kept_slopes = share
        for i, blocks in enumerate(self.layers):
            for module in blocks.modules():
                if isinstance(module, FeedForward):
                    module.keeps_slope = i < round(share * len(self.layers))

    @property
    def num_tokens(self) -> int:
        """V, as the embedding or what is in its place has it; else as it was made."""
        weight = self.token_emb._parameters.get("weight")
        if exists(weight):
            return len(weight)
        sizes = (getattr(m, "num_embeddings", None) for m in self.token_emb.modules())
        return next(filter(exists, sizes), self._num_tokens)

    @property
    def way(self) -> tuple:
        """Attributes that decide on which way a forward takes; scripts may set them."""
        return (
            *(self.need_hierarchical_merge, self.hierarchy_merge_all, self.should_recon),
            *(self.predict_use_all_hierarchy, self.predict_hierarchy_index),
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def ops_for(self, device: torch.device) -> SimpleNamespace:
        """The ops every layer calls, for tensors on `device`."""
        return ops.resolve(self.impl, device)

    def plan(
        self,
        ops: SimpleNamespace | None = None,
        checked: bool = False,
        take: Take | None = None,
    ) -> Plan:
        """Plan a forward in the autocast region that is open.

        Args:
            ops: in place of those of `impl`.
            checked: whether ids are known to be in range, so that nothing waits for the device.
            take: is called with the name (layer, level, what) and the tensor (B, M, ...) of all
                that tokens to come read of this forward: "attn" and "ff" are the residual stream
                before either, "qkv" is before the rotation, "merge" is what is merged.
        """
        plan = make_plan(self, ops or self.ops_for(self.device), checked, take)
        if plan.called and not self._told and not torch.compiler.is_compiling():
            self._told = True
            if plan.ops is not REFERENCE:
                names = unfused(self)
                first, reason = next(iter(names.items()))
                warnings.warn(
                    f"{len(names)} modules run by themselves, and not within a fused op: {first}"
                    f" {reason}; shtx.plan.unfused(model) has all of them",
                    stacklevel=4,
                )
        return plan

    def run_block(self, block: HierarchicalBlock, x: Tensor, branch: Tensor | None, plan: Plan):
        def run(x, branch):
            if plan.reads(block):
                return (block if block in plan.sharded else block.run)(x, branch, plan)
            return dense(block(add(x, branch)).to(x.dtype)), None

        def run_in_any_thread(x, branch):  # backward has one of its own
            with plan.narrow_weights():
                return run(x, branch)

        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return run(x, branch)
        # no state of random numbers, which a block has no use for and a CUDA graph cannot read
        options = dict(use_reentrant=False, preserve_rng_state=False)
        return checkpoint(run_in_any_thread, x, branch, **options)

    def run_merge(self, merge: HierarchicalMerge, tokens: list, branches: list, plan: Plan):
        if plan.reads(merge):
            return (merge if merge in plan.sharded else merge.run)(tokens, branches, plan)
        tokens = list(map(add, tokens, branches))
        return tokens, dense(merge(tokens))

    def branches_of(self, merged: Tensor) -> list[Tensor | None]:
        """Split the merged tensor (B, N, D) into the branches that levels add; None is nothing."""
        if self.hierarchy_merge_all:
            split = zip(merged.split(self.dims, dim=-1), self.levels, strict=True)
            return [m[:, :: level.stride] for m, level in split]
        branches = [None] * len(self.levels)
        branches[self.predict_hierarchy_index] = merged
        return branches

    def run(
        self,
        ids: Tensor,
        *,
        return_loss: bool,
        return_hierarchical_token_embeds: bool,
        return_hierarchical_embeds: bool,
        return_logits_and_embeds: bool = False,
        ablate_hierarchical_merge: bool,
        loss_reduction: str,
        labels: Tensor | None,
        plan: Plan | None,
    ):
        """A forward, see those of subclasses."""
        return_loss = return_loss or labels is not None
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
        other = return_hierarchical_token_embeds or return_hierarchical_embeds
        other = other or return_logits_and_embeds or ablate_hierarchical_merge or plan is not None
        if self.graphs and return_loss and not other:
            outputs = replay(self, ids, labels, loss_reduction)
            if outputs is not None:
                return outputs
        plan = plan or self.plan()
        ids = self.check_ids(ids, return_loss, plan.checked)
        if return_loss:
            labels = ids if labels is None else self.check_labels(labels, ids, plan.checked)
            ids, labels = ids[:, :-1], labels[:, 1:]
        with plan.narrow_weights():
            tokens, x = self.embed(ids, plan)
            if return_hierarchical_token_embeds:
                return tokens
            embeds = self.transform(tokens, plan, ablate_hierarchical_merge)
            if return_hierarchical_embeds:
                return embeds
            embed = embeds[self.predict_hierarchy_index]
            if self.predict_use_all_hierarchy:
                embed = plan.ops.hierarchical_cat(embeds, self.h_strides)
            if return_logits_and_embeds:
                return self.to_logits(embed), embeds
            if not return_loss:
                return self.to_logits(embed)
            pairs = losses.run(self, losses.Inputs(ids, labels, embed, embeds, x), plan)
        if loss_reduction == "sum":
            return losses.columns(pairs)
        return self.combine(losses.means(pairs))

    def embed(self, ids: Tensor, plan: Plan) -> tuple[list[Tensor], Tensor | None]:
        """Return the levels as they enter the first layer, and the embeddings of ids (B, N, D) if a
        module had to be called for them.
        """
        read = [
            plan.reads(self.token_emb) and plan.reads(c) and c.is_read(plan)
            for c in self.compressors
        ]
        x = None if all(read) else self.token_emb(ids)
        tokens = [
            compress.run(ids, self.token_emb.weight, plan) if is_read else dense(compress(x))
            for compress, is_read in zip(self.compressors, read, strict=True)
        ]
        parts = zip(self.post_token_emb_norms, tokens, strict=True)
        return [end_norm(norm, t, None, plan) for norm, t in parts], x

    def transform(self, tokens: list[Tensor], plan: Plan, ablate_merge: bool) -> list[Tensor]:
        """Return the levels as they leave the last layer, normalized."""
        branches = [None] * len(tokens)  # what the next norm is to add
        merges = zip_longest(self.layers, self.hierarchical_merges)
        for layer, (blocks, merge) in enumerate(merges):
            plans = [plan.at(layer, level) for level in range(len(tokens))]
            parts = zip(blocks, tokens, branches, plans, strict=True)
            tokens, branches = zip(*(self.run_block(*part) for part in parts), strict=True)
            if exists(merge) and self.need_hierarchical_merge and not ablate_merge:
                tokens, merged = self.run_merge(merge, tokens, branches, plan)
                for x, plan_of_level in zip(tokens, plans, strict=True):
                    plan_of_level.leave("merge", x)
                branches = self.branches_of(merged)
        parts = zip(self.norms, tokens, branches, strict=True)
        return [end_norm(norm, t, branch, plan) for norm, t, branch in parts]

    def token_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a token reads of the model itself, by name."""
        yield "embedding", whole(self.token_emb.weight)
        yield "to_logits", whole(self.to_logits.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        refuse_other_version(keys, self.version)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def compressed(self) -> list[int]:
        """The levels that are not the token sequence itself."""
        return [i for i, level in enumerate(self.levels) if level.compress > 1]

    def recon_terms(self) -> list[Term]:
        """The terms of what is reconstructed: every compressed level, unless it weighs nothing."""
        levels = self.compressed if self.should_recon else []
        return [Term(Reconstruction, self.recon_loss_weight, i) for i in levels]

    @property
    def options(self) -> tuple:
        """The options that may be changed after construction; a CUDA graph freezes their values."""
        memory = self.checkpointing, self.kept_slopes
        return self.impl, self.ignore_index, self.loss_weights, memory, self.way

    @property
    def loss_weights(self) -> list[float]:
        """Weights of what loss_reduction="sum" returns: loss = sum(weights * sums / counts)."""
        return losses.weights(self.terms)

    def loss_counts(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The counts (L,) that loss_reduction="sum" returns for ids, without a forward."""
        # out of range they count, too, and a forward says so
        labels = ids if labels is None else self.check_labels(labels, ids, checked=True)
        return losses.counts(self, ids[:, :-1], labels[:, 1:])

    def combine(self, values: list[Tensor]) -> tuple[Tensor, tuple]:
        """The loss and its parts, as a forward returns them, of the values of all `terms`."""
        raise NotImplementedError


class HierarchicalTransformer(Trunk):
    """A causal language model over several compressed copies of its sequence.

    Arguments, defaults, returns and checkpoints are those of simple-hierarchical-transformer
    0.2.0. An argument marked * is one value, or a tuple or list with one for each of `hierarchies`.

    Args:
        num_tokens: V, the vocabulary.
        dim: * width; the widest is the embedding's.
        depth: layers.
        seq_len: longest input, in tokens.
        dim_head: * width of an attention head, even.
        heads: * attention heads.
        ff_mult: * width of the feed-forward's inner layer over `dim`.
        hierarchies: compression of each level, different powers of two: (1, 2, 8) are three levels.
        window_sizes: * how many tokens of its level a token looks back on, in steps of
            `hierarchies / hierarchical_stride`; None: all; 0: no attention.
        hierarchical_stride: * input tokens per token of the level, a power of two that divides the
            level's compression; 1: a token at every position.
        hierarchy_merge_all: merge into all levels rather than the predicting one alone.
        predict_hierarchy: the level that predicts; the least compressed by default.
        predict_use_all_hierarchy: predict from all levels side by side.
        recon_loss_weight: of the loss that reconstructs each level token's input tokens; 0: left
            out.
        hierarchical_ar_loss_weight: of the loss that predicts each level token's successor.
        ignore_index: label that the next-token loss leaves out.
        use_flash_attn: accepted and without effect, as upstream.
        impl: "fused" (Triton ops), "reference" (plain PyTorch), or "auto": fused on CUDA tensors,
            reference elsewhere and within torch.func (vmap, grad, ...). `model.impl = ...` changes
            it.

    Attributes:
        checked: check on a GPU, too, that ids and labels are in range (always done on a CPU); costs
            a synchronisation.
        checkpointing: in training, keep no more of a block than what enters it, and run it again in
            the backward: less memory, one more forward, the same gradients to the bit.
        kept_slopes: share of the layers, the first ones, whose feed-forwards keep the slope of GELU
            beside its result, and not its argument alone, on Hopper in 16-bit precision. With 1,
            steps on an H200 took 1 to 4.5% less time for 11 to 22% more memory; 0 takes the least.
        graphs: in training on CUDA, replay a CUDA graph in place of a forward with return_loss, and
            another in place of its backward, from the second forward of a shape of ids on: the same
            bits at the speed of TrainStep, in any loop, DistributedDataParallel included. A forward
            has one backward. What a graph froze may change at any time, which costs an eager
            forward and a capture. Shapes have a graph each, up to four; other forwards, and those
            of a model with hooks, run eagerly.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """

    version = "0.2.0"

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
        hierarchical_ar_loss_weight=0.25,
        ignore_index=0,
        use_flash_attn=False,
        impl="auto",
    ):
        super().__init__()
        self.hierarchical_ar_loss_weight = number(
            "hierarchical_ar_loss_weight", hierarchical_ar_loss_weight
        )
        self.has_hierarchical_ar_loss = hierarchical_ar_loss_weight > 0
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
        self.token_emb = nn.Embedding(num_tokens, max(self.dims))
        self.to_hierarchical_preds = ModuleList(
            Linear(level.dim, level.dim) if level.compress > 1 else None for level in self.levels
        )
        self.make_compressors(num_tokens)
        self.make_layers(num_tokens, depth, impl)

    def forward(
        self,
        ids,
        return_loss=False,
        return_hierarchical_token_embeds=False,
        return_hierarchical_embeds=False,
        ablate_hierarchical_merge=False,
        loss_reduction="mean",
        *,
        labels=None,
        plan=None,
    ):
        """Logits, or the loss of predicting each token from those before it.

        Args:
            ids: (B, N) integers of any type in [0, num_tokens), N <= seq_len (+ 1 with
                return_loss).
            return_loss: return the loss in place of logits.
            return_hierarchical_token_embeds: return the levels as they enter the first layer.
            return_hierarchical_embeds: return the levels as they leave the last layer, normalized.
            ablate_hierarchical_merge: leave the merges out.
            loss_reduction: "mean", or "sum": return sums and counts in place of the loss, so that
                batches of unequal counts can add up to one. See `loss_weights`.
            labels: (B, N) integers, aligned with ids: the loss is that of predicting labels[:, i]
                from ids[:, :i]. None: ids. Those that are -100 or ignore_index are left out, as the
                prompts of a fine-tuning. They imply return_loss. Only the next-token loss looks at
                them: what levels reconstruct and foretell is made of the ids, prompts included.
            plan: how to run, what `self.plan()` returns; made for this call by default.

        Returns:
            (B, N, V) logits; or the 0-dim loss and its parts (next token, reconstruction,
            hierarchical autoregressive), in nats where they are cross entropies; or the sums (L,)
            of all losses and the counts (L,) they are over; or a list of (B, ceil(N / stride),
            dim). A loss without a single label that counts is 0.

        Raises:
            TypeError, ValueError: for ids or labels that are not as above, or impl="fused" where it
                cannot run.
        """
        return self.run(
            ids,
            return_loss=return_loss,
            return_hierarchical_token_embeds=return_hierarchical_token_embeds,
            return_hierarchical_embeds=return_hierarchical_embeds,
            ablate_hierarchical_merge=ablate_hierarchical_merge,
            loss_reduction=loss_reduction,
            labels=labels,
            plan=plan,
        )

    @property
    def terms(self) -> list[Term]:
        weight = self.hierarchical_ar_loss_weight
        ar = [Term(HierarchicalAR, weight, i) for i in self.compressed]
        return [Term(NextToken, 1.0), *self.recon_terms(), *ar]

    def combine(self, values: list[Tensor]) -> tuple[Tensor, tuple]:
        loss, parts = losses.combine(self.terms, values)
        none = values[0].new_zeros(())
        kinds = NextToken, Reconstruction, HierarchicalAR
        return loss, tuple(parts[kind].value if kind in parts else none for kind in kinds)
