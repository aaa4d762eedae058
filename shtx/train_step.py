"""One optimizer step as one call; on a GPU, all of it is one CUDA graph for each shape of ids.

A graph replays the same kernels on the same memory. What may differ from step to step lies in
tensors that are written before a replay: the ids and the learning rates. Everything else that a
graph took in is compared at every call, and graphs that no longer hold are given up. The first step
of a shape runs eagerly, once its kernels are compiled, and creates the optimizer's state. The
second is captured, which computes nothing, and replayed. So every call is exactly one step.

Of several processes, each has a share of the batch; see shtx.parallel.
"""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from shtx.graphs import MAX_GRAPHS, Graphs, comparable, run_aside
from shtx.internals import is_compiled, scales_its_gradients, tree_map, tree_map_only
from shtx.levels import integer
from shtx.losses import means_of_columns
from shtx.ops import FUSED, compile_ahead
from shtx.optimizers import Optimizers
from shtx.parallel import Alone, Replicas, ranks_of, take_over, unwrap
from shtx.plan import Layer, Plan, check_in_memory, is_sharded
from shtx.shares import Shares

PARAMETERS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


@dataclass
class Step:
    """A captured step of one shape of ids: where a replay reads them and their labels, if these are
    others, and the outputs that it overwrites.
    """

    ids: Tensor
    labels: Tensor | None
    graph: torch.cuda.CUDAGraph
    outputs: tuple


def _reads_tensors(group: dict) -> bool:
    """Return whether the update of this group reads its numbers from the device."""
    return bool(group.get("fused") or group.get("capturable"))


class TrainStep:
    """Forward, backward, clipping and update of a HierarchicalTransformer, as a function of ids.

    Where torch.distributed is initialized, all its processes make a TrainStep together, which
    starts from the weights of the first, and take each step together, each on a share of the batch.
    Loss, its parts, gradients and their norm are those of the whole batch, whatever labels a share
    ignores, and weights stay equal to the bit. A step whose shares differ in shape has no CUDA
    graph. `close` has to be called before the process group is destroyed.

    Args:
        model: a HierarchicalTransformer, compiled or not, on its device; or in a
            DistributedDataParallel, in whose place this sums gradients from then on, or sharded by
            FSDP2's fully_shard, whose steps run without a CUDA graph.
        optimizer: of the model's parameters, or several, each of some of them, which update one
            after the other from gradients that are clipped together. For a CUDA graph their groups
            must have fused=True or capturable=True, as AdamW's and those of shtx.muon.Muon can.
            Learning rates may change between calls, in any way; fused and
            capturable groups read them in fp32 on CUDA, with a CUDA graph or without. Any other
            change, of a group, of the model, of an attribute of this object or of PyTorch's modes,
            costs an eager step and a capture.
        precision: "bf16-mixed" (autocast; fp32 parameters), "fp16-mixed" (the same; gradients are
            scaled, and a step in which one overflows changes nothing but the scale; of a single
            optimizer), "fp32", or "bf16" (bf16 parameters).
        grad_clip: greatest norm of all gradients together; None: any.
        accumulate: micro-batches that the batch of ids is split into, for less memory. Loss and
            gradients are those of the whole batch, whatever labels each of them ignores.
        cuda_graph: on CUDA, replay a CUDA graph from the second call with a shape of ids on. Hooks
            of the optimizer's step do not run in a replay. Of a model that has hooks, or that
            cannot be captured, steps run eagerly, with a warning.
        process_group: of the processes that step together; None: that of a DistributedDataParallel
            or FSDP2 model, else all; False: this process steps alone.
        shard_optimizer: each process keeps the optimizers' state of a share of the parameters, each
            of which is whole, gets the gradients of these, and updates them. `optimizer_state_dict`
            has all of it. A model under FSDP2 takes optimizers of parts of parameters: AdamW, not
            Muon.

    Attributes:
        grad_norm: 0-dim, of the last step, before clipping; None without grad_clip.
        scaler: the torch.amp.GradScaler of precision="fp16-mixed", whose state belongs in a
            checkpoint; of other precisions it does nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """

    def __init__(
        self,
        model: Module,
        optimizer: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]",
        *,
        precision: str = "bf16-mixed",
        grad_clip: float | None = None,
        accumulate: int = 1,
        cuda_graph: bool = True,
        process_group: "dist.ProcessGroup | Literal[False] | None" = None,
        shard_optimizer: bool = False,
    ):
        if not isinstance(model, Module):
            raise TypeError(
                "TrainStep takes a model and its optimizer or several of them, in this order, got"
                f" {type(model).__name__} for the model"
            )
        self.optimizers = Optimizers(optimizer)
        check_in_memory(model)
        self.model, self.optimizer = model, optimizer
        self.precision, self.grad_clip, self.accumulate = precision, grad_clip, accumulate
        self.shard_optimizer = shard_optimizer
        self.grad_norm = None
        self._learning_rates = []  # a tensor a group, on CUDA
        self._warned = False  # whether a warning has told of hooks
        self._compiled = False
        self._graphs = None
        self._sharded = any(map(is_sharded, self._parameters))
        self._ranks = ranks_of(model, process_group)
        with self._ranks.together(self._settings):
            self._check_arguments()
            self._module = unwrap(model)  # what steps call
            self._core = getattr(self._module, "module", self._module)
            self._device = self._core.device
            fp16 = precision == "fp16-mixed"
            self.scaler = torch.amp.GradScaler(self._device.type, enabled=fp16)
            if cuda_graph and self._device.type == "cuda" and self._can_be_captured():
                self._graphs = Graphs(self._device, MAX_GRAPHS)
        take_over(model)
        self._ranks.copy_first()
        self._shares = None
        if shard_optimizer and isinstance(self._ranks, Replicas):
            self._shares = Shares(self.optimizers, self._ranks)
        if self._graphs is not None:  # the process group, or the interpreter, may end first
            weakref.finalize(self, self._graphs.kept.clear)

    def _check_arguments(self) -> None:
        model, precision, grad_clip = self.model, self.precision, self.grad_clip
        if precision not in PARAMETERS:
            allowed = ", ".join(map(repr, PARAMETERS))
            raise ValueError(f"precision must be one of {allowed}, got {precision!r}")
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.dtype != PARAMETERS[precision]:
                raise ValueError(
                    f"precision={precision!r} takes parameters of {PARAMETERS[precision]},"
                    f" got {p.dtype}: {name}"
                )
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip must be above 0 or None, got {grad_clip}")
        self.accumulate = integer("accumulate", self.accumulate, at_least=1)
        if precision == "fp16-mixed" and (self.shard_optimizer or self._sharded):
            raise ValueError(
                'precision must not be "fp16-mixed" where a rank has a part of the parameters'
                " (shard_optimizer, fully_shard): what overflows elsewhere would go unseen"
            )
        if precision == "fp16-mixed" and len(self.optimizers.all) > 1:
            raise ValueError(
                'precision must not be "fp16-mixed" with several optimizers, got'
                f" {len(self.optimizers.all)}: what overflows for one would step for another"
            )
        trained = {p for p in model.parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        if not any(p in trained for group in self.optimizers.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer must have parameters of the model that require a gradient, got none of"
                f" the {len(trained)}: it was made of another model's, or before they were replaced"
            )

    def _settings(self) -> dict:
        """The settings that all ranks must have in common, by name."""
        names = "precision", "grad_clip", "accumulate", "shard_optimizer"
        settings = {name: getattr(self, name) for name in names}
        settings["cuda_graph"] = self._graphs is not None
        settings["loss_weights"] = self._core.loss_weights
        settings["optimizer"] = [type(optimizer).__name__ for optimizer in self.optimizers.all]
        group_of = {}
        for i, group in enumerate(self.optimizers.param_groups):
            group_of |= dict.fromkeys(group["params"], i)
            plain = {k: v for k, v in group.items() if isinstance(v, (int, float, str, tuple))}
            settings[f"group {i} of the optimizer"] = plain
        for name, p in self._core.named_parameters():
            settings[f"parameter {name}"] = (
                f"{tuple(p.shape)}, {p.dtype}, strides {p.stride()},"
                f" requires_grad={p.requires_grad}, group {group_of.get(p)} of the optimizer"
            )
        return settings

    @property
    def _parameters(self) -> list[Parameter]:
        return list(self.model.parameters())

    def __call__(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, tuple]:
        """One step, of fresh gradients, which are gone after it.

        The first one compiles before, as `compile` does.

        If forward or backward raises, parameters and optimizer are as they were.

        Args:
            ids: (B, N + 1) integers, as HierarchicalTransformer.forward takes with return_loss; B
                is a multiple of `accumulate`.
            labels: (B, N + 1) integers, as HierarchicalTransformer.forward takes; None: ids.

        Returns:
            the 0-dim loss and its parts, as of HierarchicalTransformer.forward, detached.

        Raises:
            TypeError, ValueError: for ids or labels that are not as above.
        """
        ids = self._check_ids(ids)
        labels = None if labels is None else self._core.check_labels(labels, ids)
        self.compile(ids)
        with torch.cuda.device_of(ids):
            self._write_learning_rates()
            step = self._step if self._graphs is None else self._graphed_step
            loss, parts, self.grad_norm = step(ids, labels)
        return loss, parts

    def compile(self, ids: Tensor) -> None:
        """Compile the kernels of the fused ops, side by side, unless that is done.

        Forward and backward run, and compute nothing but garbage, which no parameter sees. Of a
        sharded model all ranks have to call this.

        Args, Raises: as for a step.
        """
        if self._compiled or self._core.ops_for(self._device) is not FUSED:
            return
        ids = self._check_ids(ids)
        micro = ids[: len(ids) // self.accumulate]
        trained = [p for p in self._parameters if p.requires_grad]

        def gradients():
            with self._autocast():
                loss, _ = self._core(micro, return_loss=True, **self._plan())
                with torch.autocast(self._device.type, enabled=False):
                    if self._sharded:  # what is whole in between has no gradients to be asked for
                        loss.backward()
                    else:
                        torch.autograd.grad(loss, trained, allow_unused=True)

        with torch.cuda.device_of(ids):
            if self._graphs is None:
                compile_ahead(gradients)
            else:
                run_aside(lambda: compile_ahead(gradients), self._graphs.stream)
        if self._sharded:
            self.model.zero_grad()
        self._compiled = True

    def close(self) -> None:
        """Give up the CUDA graphs. NCCL waits for them where its process group is destroyed."""
        if self._graphs is not None:
            self._graphs.kept.clear()

    def _check_ids(self, ids: Tensor) -> Tensor:
        ids = self._core.check_ids(ids, return_loss=True)
        if len(ids) % self.accumulate:
            raise ValueError(
                f"ids must have a batch that is a multiple of accumulate, {self.accumulate},"
                f" got {len(ids)}"
            )
        return ids

    # the step

    def _step(self, ids: Tensor, labels: Tensor | None) -> tuple[Tensor, tuple, Tensor | None]:
        """Loss, its parts and the norm of the gradients of one step: what a graph holds."""
        self.model.zero_grad()
        try:
            loss, parts = self._forward_backward(ids, labels)
            for optimizer in self.optimizers.all:
                self.scaler.unscale_(optimizer)
            norm = None if self.grad_clip is None else self._clip()
            with self._tensors_in_groups():
                for optimizer in self.optimizers.all:
                    self.scaler.step(optimizer)
            self.scaler.update()
            if self._shares is not None:
                self._shares.gather()
        finally:
            self.model.zero_grad()
        return loss, parts, norm

    def _forward_backward(self, ids: Tensor, labels: Tensor | None) -> tuple[Tensor, tuple]:
        with self._autocast():
            plan = self._plan()
            if self.accumulate == 1 and type(self._ranks) is Alone:
                loss, parts = self._module(ids, return_loss=True, labels=labels, **plan)
                self._backward(loss)
                return loss.detach(), tree_map(Tensor.detach, parts)
            counts = self._ranks.sum(self._core.loss_counts(ids, labels))
            micros = ids.chunk(self.accumulate)
            labels = [None] * self.accumulate if labels is None else labels.chunk(self.accumulate)
            options = dict(return_loss=True, loss_reduction="sum", **plan)
            totals = 0
            for number, (micro, own) in enumerate(zip(micros, labels, strict=True), 1):
                sums, _ = self._module(micro, labels=own, **options)
                losses = sums / counts().clamp(min=1)
                totals = totals + losses.detach()
                if last := number == self.accumulate:
                    summed = self._ranks.sum(totals)
                self._backward(self._combine(losses)[0], last)
            return self._combine(summed())

    def _combine(self, losses: Tensor) -> tuple[Tensor, tuple]:
        """The loss and its parts, of the means of all losses."""
        core = self._core
        return core.combine(means_of_columns(core.terms, losses))

    def _plan(self) -> dict[str, Plan]:
        """Plan once for all micro-batches, so that weights are cast once; what is compiled or
        sharded plans its own forwards.
        """
        compiled = is_compiled(self._core) or not isinstance(self._core, Layer)
        return {} if compiled or self._sharded else dict(plan=self._core.plan(checked=True))

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """One region, whose casts of weights are of this step alone."""
        torch.clear_autocast_cache()  # the caller's own region may be open
        dtype = AUTOCAST.get(self.precision)
        try:
            with torch.autocast(self._device.type, dtype, enabled=dtype is not None):
                yield
        finally:
            torch.clear_autocast_cache()

    def _backward(self, loss: Tensor, last: bool = True) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self._ranks.backward(self.scaler.scale(loss), last)

    def _clip(self) -> Tensor:
        """Clip the gradients of all parameters together; return their norm before."""
        if self._shares is not None:
            return self._shares.clip(self._parameters, self.grad_clip)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.grad_clip)
        return norm.full_tensor() if self._sharded else norm

    # the optimizer

    def optimizer_state_dict(self) -> dict | None:
        """The optimizer's state_dict as one process would have it, of several that of one with all
        of their groups; with shard_optimizer all ranks have to call this, and the first alone gets
        it.
        """
        return (self._shares or self.optimizers).state_dict()

    def load_optimizer_state_dict(self, state_dict: dict) -> None:
        """Load what `optimizer_state_dict` gave, of any number of ranks, on every rank."""
        (self._shares or self.optimizers).load_state_dict(state_dict)

    def _write_learning_rates(self) -> None:
        """Write them to the device ahead of the step: a graph repeats the numbers it captured."""
        if self._device.type != "cuda":
            return
        groups, tensors = self.optimizers.param_groups, self._learning_rates
        tensors += [torch.zeros((), device=self._device) for _ in groups[len(tensors) :]]
        for group, tensor in zip(groups, tensors, strict=True):
            tensor.fill_(group["lr"])

    @contextmanager
    def _tensors_in_groups(self) -> Iterator[None]:
        """Learning rates as tensors, for an update alone: schedulers and checkpoints see theirs."""
        before = []
        for group, tensor in zip(self.optimizers.param_groups, self._learning_rates, strict=False):
            if _reads_tensors(group):
                before.append((group, dict(group)))
                group["lr"] = tensor
                if "capturable" in group:  # fused ones are, whatever they say
                    group["capturable"] = True
        try:
            yield
        finally:
            for group, values in before:
                group |= values

    def _can_be_captured(self) -> bool:
        """False, with a warning, for a model that something else wraps or shards."""
        reason = self._ranks.why_not_captured
        if self._core is not self._module:
            reason = f"the model is in a {type(self._module).__name__}"
        if reason is not None:
            warnings.warn(
                f"cuda_graph=True does nothing as {reason}: steps run eagerly", stacklevel=3
            )
            return False
        needed = "fused=True or capturable=True"
        for optimizer in self.optimizers.all:
            fits = all(map(_reads_tensors, optimizer.param_groups))
            if self.scaler.is_enabled():  # only a fused update finds out what overflowed
                needed = 'fused=True with precision="fp16-mixed"'
                fits = scales_its_gradients(optimizer)
            if not fits:
                raise ValueError(
                    f"optimizer must have {needed} for a CUDA graph, got"
                    f" {type(optimizer).__name__} without; cuda_graph=False takes any"
                )
        return True

    # the graphs

    def _graphed_step(
        self, ids: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, tuple, Tensor | None]:
        graphs = self._graphs
        holds = graphs.hold(self._core, self._frozen())
        reason = graphs.structure.hooked()
        # NCCL wants all ranks to capture or replay what one of them does
        if not self._ranks.same((holds, reason is None, labels is None, *ids.shape)):
            reason = (
                "of the ranks some have ids of another shape, labels, another structure or hooks"
            )
        if reason is not None:
            if not self._warned:
                self._warned = True
                warnings.warn(f"steps run without a CUDA graph: {reason}", stacklevel=3)
            graphs.kept.clear()
            return self._step(ids, labels)
        name = f"a step of ids of shape {tuple(ids.shape)}"
        key = ids.shape, labels is not None
        step = graphs.get(key, lambda: self._capture(ids, labels), name)
        if step is None:
            return run_aside(lambda: self._step(ids, labels), graphs.stream)
        step.ids.copy_(ids)
        if labels is not None:
            step.labels.copy_(labels)
        self.model.zero_grad()
        step.graph.replay()
        torch.clear_autocast_cache()  # a caller's region has the weights of before
        return tree_map_only(Tensor, torch.clone, step.outputs)

    def _capture(self, ids: Tensor, labels: Tensor | None) -> Step:
        ids = ids.clone(memory_format=torch.contiguous_format)
        if labels is not None:
            labels = labels.clone(memory_format=torch.contiguous_format)
        with self._ranks.together(lambda: {"the shape of ids": tuple(ids.shape)}):
            return Step(ids, labels, *self._graphs.capture(lambda: self._step(ids, labels)))

    def _frozen(self) -> list:
        """The values besides the model's that a graph of a step has frozen."""
        varying = ("params", "lr", "initial_lr")
        groups = [
            {name: comparable(value) for name, value in group.items() if name not in varying}
            for group in self.optimizers.param_groups
        ]
        stepped = [list(map(id, group["params"])) for group in self.optimizers.param_groups]
        # load_state_dict puts another state in the place of the one whose memory graphs update
        options = self.precision, self.grad_clip, self.accumulate
        options = *options, *map(id, self.optimizers.states)
        scaler = self.scaler
        if scaler.is_enabled():
            growth = scaler.get_growth_factor(), scaler.get_backoff_factor()
            options = *options, *growth, scaler.get_growth_interval()
        return [groups, stepped, options]
