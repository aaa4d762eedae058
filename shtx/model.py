"""The hierarchical transformer, under the interface and checkpoint format of
simple-hierarchical-transformer.

Several copies of the sequence, the levels, run side by side, each compressed by a causal
convolution and each with its own transformer blocks. After every layer they are merged into the
level that predicts the next token.
"""

import warnings
from itertools import zip_longest
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import Linear, ModuleList
from torch.utils.checkpoint import checkpoint

from shtx import ops
from shtx.generate import generate
from shtx.graphed_loss import replay
from shtx.layers import Compress, HierarchicalBlock, HierarchicalMerge, add, dense, end_norm, exists
from shtx.levels import integer, make_levels, number
from shtx.ops import REFERENCE, cosine_distance, cross_entropy, windows
from shtx.plan import Layer, Plan, make_plan, unfused


@torch.library.custom_op("shtx::checked_ids", mutates_args=())
def checked_ids(ids: Tensor, num_tokens: int) -> Tensor:
    """ids as int64, every one below num_tokens. An op, so that the check outlives torch.compile."""
    ids = ids.to(torch.long, copy=True)
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"ids must be in [0, num_tokens) = [0, {num_tokens}),"
                f" got {low if low < 0 else high}"
            )
    return ids


@checked_ids.register_fake
def _(ids, num_tokens):
    return torch.empty_like(ids, dtype=torch.long)


class HierarchicalTransformer(Layer):
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
        checked: check on a GPU, too, that ids are in range (always done on a CPU); costs a
            synchronisation.
        checkpointing: in training, keep no more of a block than what enters it, and run it again in
            the backward: less memory, one more forward, the same gradients to the bit.
        graphs: in training on CUDA, replay a CUDA graph in place of a forward with return_loss, and
            another in place of its backward, from the second forward of a shape of ids on: the same
            bits at the speed of TrainStep, in any loop, DistributedDataParallel included. A forward
            has one backward. What a graph froze may change at any time, which costs an eager
            forward and a capture. Shapes have a graph each, up to four; other forwards, and those
            of a model with hooks, run eagerly.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """

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
        self.checked = False
        self.checkpointing = False
        self.graphs = False
        self._num_tokens = num_tokens = integer("num_tokens", num_tokens, at_least=1)
        self.seq_len = integer("seq_len", seq_len, at_least=1)
        self.ignore_index = integer("ignore_index", ignore_index)
        self.recon_loss_weight = number("recon_loss_weight", recon_loss_weight)
        self.hierarchical_ar_loss_weight = number(
            "hierarchical_ar_loss_weight", hierarchical_ar_loss_weight
        )
        self.has_hierarchical_ar_loss = hierarchical_ar_loss_weight > 0
        self.should_recon = recon_loss_weight > 0
        self.hierarchy_merge_all = hierarchy_merge_all
        self.predict_use_all_hierarchy = predict_use_all_hierarchy

        self.levels = levels = make_levels(
            hierarchies=hierarchies,
            hierarchical_stride=hierarchical_stride,
            dim=dim,
            dim_head=dim_head,
            heads=heads,
            window_sizes=window_sizes,
            ff_mult=ff_mult,
            seq_len=self.seq_len,
        )
        self.hierarchies = tuple(level.compress for level in levels)
        self.h_strides = tuple(level.stride for level in levels)
        self.dims = dims = tuple(level.dim for level in levels)
        self.predict_hierarchy_index = self.index_of(predict_hierarchy)
        self.need_hierarchical_merge = len(levels) > 1
        predicting = levels[self.predict_hierarchy_index]

        # in upstream's order, so that a seed gives upstream's initial weights

        self.token_emb = nn.Embedding(num_tokens, max(dims))
        self.to_hierarchical_preds = ModuleList(
            Linear(level.dim, level.dim) if level.compress > 1 else None for level in levels
        )
        self.compressors = ModuleList(
            Compress(level, max(dims), num_tokens, should_recon=self.should_recon)
            for level in levels
        )
        self.post_token_emb_norms = ModuleList(nn.LayerNorm(d) for d in dims)

        self.layers = ModuleList()
        self.hierarchical_merges = ModuleList()
        for _ in range(integer("depth", depth, at_least=0)):
            self.layers.append(ModuleList(HierarchicalBlock(level) for level in levels))
            if self.need_hierarchical_merge:
                dim_out = sum(dims) if hierarchy_merge_all else predicting.dim
                self.hierarchical_merges.append(HierarchicalMerge(levels, dim_out))

        self.norms = ModuleList(nn.LayerNorm(d) for d in dims)
        dim_logits = sum(dims) if predict_use_all_hierarchy else predicting.dim
        self.to_logits = Linear(dim_logits, num_tokens, bias=False)
        self.remember()
        # equal in all processes: if DistributedDataParallel wrote them every step, they would have
        # to be read again every step
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.impl = impl
        self._told = False  # which of its modules run unfused

    generate = generate
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

    def plan(self, ops: SimpleNamespace | None = None, checked: bool = False) -> Plan:
        """How a forward runs, in the autocast region that is open.

        Args:
            ops: in place of those of `impl`.
            checked: whether ids are known to be in range, so that nothing waits for the device.
        """
        plan = make_plan(self, ops or self.ops_for(self.device), checked)
        if plan.called and not self._told and not torch.compiler.is_compiling():
            self._told = True
            if plan.ops is not REFERENCE:
                names = unfused(self)
                first, reason = next(iter(names.items()))
                warnings.warn(
                    f"{len(names)} modules run by themselves, and not within a fused op: {first}"
                    f" {reason}; shtx.plan.unfused(model) has all of them",
                    stacklevel=3,
                )
        return plan

    def check_ids(self, ids: Tensor, return_loss: bool, checked: bool = False) -> Tensor:
        """ids as int64, or an error that says what is wrong with them.

        Args:
            checked: whether they are known to be in range.
        """
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor of integers, got {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be a tensor of integers, got {ids.dtype}")
        if ids.ndim != 2:
            raise ValueError(f"ids must be (batch, tokens), got shape {tuple(ids.shape)}")
        if ids.device != self.device:
            raise ValueError(f"ids must be on the model's {self.device}, got {ids.device}")
        least, most = 1 + return_loss, self.seq_len + return_loss
        if not least <= ids.shape[1] <= most:
            asked = " with return_loss" if return_loss else ""
            raise ValueError(
                f"ids must have {least} to {most} tokens (seq_len {self.seq_len}{asked}),"
                f" got {ids.shape[1]}"
            )
        if not checked and (ids.device.type == "cpu" or self.checked):
            if not torch.compiler.is_exporting():  # to where only PyTorch's own ops are known
                return checked_ids(ids, self.num_tokens)
        return ids.long()

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
        """What was merged, (B, N, D), as what the predicting level or every one has to add."""
        if self.hierarchy_merge_all:
            split = zip(merged.split(self.dims, dim=-1), self.levels, strict=True)
            return [m[:, :: level.stride] for m, level in split]
        branches = [None] * len(self.levels)
        branches[self.predict_hierarchy_index] = merged
        return branches

    def forward(
        self,
        ids,
        return_loss=False,
        return_hierarchical_token_embeds=False,
        return_hierarchical_embeds=False,
        ablate_hierarchical_merge=False,
        loss_reduction="mean",
        *,
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
            plan: how to run, what `self.plan()` returns; made for this call by default.

        Returns:
            (B, N, V) logits; or the 0-dim loss and its parts (next token, reconstruction,
            hierarchical autoregressive), in nats where they are cross entropies; or the sums (L,)
            of all losses and the counts (L,) they are over; or a list of (B, ceil(N / stride),
            dim). A loss without a single label that counts is 0.

        Raises:
            TypeError, ValueError: for ids that are not as above; ValueError for impl="fused" where
            it cannot run.
        """
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
        other = return_hierarchical_token_embeds or return_hierarchical_embeds
        other = other or ablate_hierarchical_merge or plan is not None
        if self.graphs and return_loss and not other:
            outputs = replay(self, ids, loss_reduction)
            if outputs is not None:
                return outputs
        plan = plan or self.plan()
        ids = self.check_ids(ids, return_loss, plan.checked)
        labels = None
        if return_loss:
            ids, labels = ids[:, :-1], ids[:, 1:]
        with plan.narrow_weights():
            tokens = self.embed(ids, plan)
            if return_hierarchical_token_embeds:
                return tokens
            embeds = self.transform(tokens, plan, ablate_hierarchical_merge)
            if return_hierarchical_embeds:
                return embeds
            embed = embeds[self.predict_hierarchy_index]
            if self.predict_use_all_hierarchy:
                embed = plan.ops.hierarchical_cat(embeds, self.h_strides)
            if not return_loss:
                return self.to_logits(embed)
            losses = self.losses(embed, embeds, ids, labels, plan)
        return self.sums(*losses) if loss_reduction == "sum" else self.means(*losses)

    def embed(self, ids: Tensor, plan: Plan) -> list[Tensor]:
        """Return the levels as they enter the first layer."""
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
        return [end_norm(norm, t, None, plan) for norm, t in parts]

    def transform(self, tokens: list[Tensor], plan: Plan, ablate_merge: bool) -> list[Tensor]:
        """Return the levels as they leave the last layer, normalized."""
        branches = [None] * len(tokens)  # what the next norm is to add
        for layer, merge in zip_longest(self.layers, self.hierarchical_merges):
            parts = zip(layer, tokens, branches, strict=True)
            results = (self.run_block(block, t, b, plan) for block, t, b in parts)
            tokens, branches = zip(*results, strict=True)
            if exists(merge) and self.need_hierarchical_merge and not ablate_merge:
                tokens, merged = self.run_merge(merge, tokens, branches, plan)
                branches = self.branches_of(merged)
        parts = zip(self.norms, tokens, branches, strict=True)
        return [end_norm(norm, t, branch, plan) for norm, t, branch in parts]

    def sums(self, ce: tuple, recon: list, hierarchical_ar: list) -> tuple[Tensor, Tensor]:
        sums, counts = zip(ce, *recon, *hierarchical_ar, strict=True)
        return torch.stack(sums), torch.stack(counts)

    def means(self, ce: tuple, recon: list, hierarchical_ar: list) -> tuple[Tensor, tuple]:
        zero = ce[0].new_zeros(())
        ce, recon, hierarchical_ar = (
            sum((total / count.clamp(min=1) for total, count in pairs), start=zero)
            for pairs in ([ce], recon, hierarchical_ar)
        )
        loss = ce + recon * self.recon_loss_weight
        loss = loss + hierarchical_ar * self.hierarchical_ar_loss_weight
        return loss, (ce, recon, hierarchical_ar)

    @property
    def loss_weights(self) -> list[float]:
        """Of the losses that loss_reduction="sum" returns: loss = sum(weights * sums / counts)."""
        levels = sum(level.compress > 1 for level in self.levels)
        recon = [self.recon_loss_weight] * (levels * self.should_recon)
        return [1.0, *recon, *[self.hierarchical_ar_loss_weight] * levels]

    def loss_counts(self, ids: Tensor) -> Tensor:
        """The counts (L,) that loss_reduction="sum" returns for ids, from the ids alone."""
        ids, labels = ids[:, :-1], ids[:, 1:]
        levels = [level for level in self.levels if level.compress > 1]
        counts = [(labels != self.ignore_index).sum()]
        for level in levels * self.should_recon:
            counts.append((windows(ids, level.compress, level.stride) != 0).sum())
        for level in levels:
            successors = (ids.shape[1] - 1) // level.stride
            counts.append(ids.new_full((), len(ids) * successors))
        return torch.stack(counts)

    def losses(self, embed: Tensor, embeds: list[Tensor], ids: Tensor, labels: Tensor, plan: Plan):
        """Sum and count of the next-token loss, and of the two others of each compressed level."""
        if embed.shape[1] != labels.shape[1]:
            raise ValueError(
                "ids must have one prediction a token for return_loss,"
                f" got {embed.shape[1]} predictions for {labels.shape[1]} tokens:"
                " hierarchical_stride must be 1 for some hierarchy"
            )
        recon, hierarchical_ar = [], []

        # gradients of weights are made here, and stay until backward: the largest come first, so
        # that what it takes to make them is not on top of the others
        parts = zip(embeds, self.levels, self.compressors, self.to_hierarchical_preds, strict=True)
        for h, level, compressor, predict in reversed(list(parts)):
            if level.compress == 1:
                continue
            if self.should_recon:
                recon.append(compressor.recon(h, ids, plan, reduction="sum"))
            if plan.reads(predict):
                args = h, predict.weight, predict.bias
                pair = plan.ops.hierarchical_ar_loss(*args, reduction="sum")
            else:
                pair = cosine_distance(predict(h)[:, :-1], h, reduction="sum")
            hierarchical_ar.append(pair)
        options = dict(ignore_index=self.ignore_index, reduction="sum")
        if plan.reads(self.to_logits):
            ce = plan.ops.linear_cross_entropy(embed, self.to_logits.weight, labels, **options)
        else:
            ce = cross_entropy(self.to_logits(embed), labels, **options)
        return ce, recon[::-1], hierarchical_ar[::-1]
