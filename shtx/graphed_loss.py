"""The loss of a model and its gradients as two CUDA graphs, for loops that call both themselves.

The first forward of a shape of ids runs eagerly, once its kernels are compiled. At the second,
forward and backward are captured, and replayed from then on. To autograd a replay is one function
of all parameters, so that gradients arrive as ever: added up in `.grad`, scaled, reduced, hooked.

A backward leaves gradients where its graph writes them, which costs neither time nor memory. Before
the next replay, those that are still in `.grad` are moved; where somebody else has one, that
forward runs eagerly. It does so, too, while the backward of the last replay may still come.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from shtx.graphs import MAX_GRAPHS, Graphs
from shtx.internals import (
    TreeSpec,
    copy_all,
    count_dispatch_modes,
    count_holders,
    is_managed_by_fsdp,
    modules_below,
    packs_saved_tensors,
    parameters_below,
    parameters_of,
    storage_of,
    transforms_active,
    tree_flatten,
    tree_unflatten,
)
from shtx.ops import FUSED, compile_ahead
from shtx.plan import is_sharded


@dataclass
class Captured:
    """Forward and backward of one shape of ids, and what they read and write.

    Attributes:
        parameters: that are trained.
        ids, labels, grad_outputs: to be written before a replay of the forward, of the backward;
            labels are None where they are the ids.
        outputs, spec: what a replay of the forward writes, flat, and how a forward returns it.
        differentiable: which outputs have a gradient.
        gradients: of parameters, which a replay of the backward writes; None where there is none.
        memory: (address of its storage, how many hold it while nobody has been given it) of each.
    """

    parameters: list[Parameter]
    ids: Tensor
    labels: Tensor | None
    grad_outputs: list[Tensor]
    forward: torch.cuda.CUDAGraph
    outputs: list[Tensor]
    spec: TreeSpec
    differentiable: list[bool]
    backward: torch.cuda.CUDAGraph
    gradients: list[Tensor | None]

    def __post_init__(self):
        pairs = zip(self.parameters, self.gradients, strict=True)
        self.places = [(p, g.data_ptr()) for p, g in pairs if g is not None]
        storages = [storage_of(g) for g in self.gradients if g is not None]
        self.memory = [(storage, count_holders(storage)) for storage in storages]

    def take_back(self) -> bool:
        """Give gradients that are still in `.grad` memory of their own; return whether nobody else
        has one.
        """
        kept = [p for p, at in self.places if p.grad is not None and p.grad.data_ptr() == at]
        if kept:
            moved = [torch.empty_like(p.grad) for p in kept]
            copy_all(moved, [p.grad for p in kept])
            for p, gradient in zip(kept, moved, strict=True):
                p.grad = gradient
        return all(count_holders(storage) == before for storage, before in self.memory)


class Turn:
    """A replayed forward, until its backward."""

    def __init__(self, owner: "GraphedLoss", captured: Captured):
        self.owner, self.captured, self.done = owner, captured, False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, turn: Turn, *parameters: Parameter) -> tuple[Tensor, ...]:
        ctx.turn, captured = turn, turn.captured
        turn.owner.graphs.replay(captured.forward)
        outputs = tuple(output.clone() for output in captured.outputs)
        pairs = zip(outputs, captured.differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, has in pairs if not has))
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.turn.owner.backward(ctx.turn, grad_outputs)


class GraphedLoss:
    """Forward with a loss, and its backward, of one model under `model.graphs`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs = Graphs(device, MAX_GRAPHS)
        self.lock = threading.Lock()
        self.last = lambda: None  # a weak reference to the last Turn
        self.given = None  # the Captured whose gradients were given away last
        self.compiled, self._warned = False, set()

    def __call__(self, model: Module, ids: Tensor, labels: Tensor | None, loss_reduction: str):
        """Return what a forward returns; None where it has to run eagerly."""
        with self.lock, torch.cuda.device_of(ids):
            captured = self._captured(model, ids, labels, loss_reduction)
            if captured is None:
                return None
            captured.ids.copy_(ids)
            if labels is not None:
                captured.labels.copy_(labels)
            turn = Turn(self, captured)
            self.last = ref(turn)
            outputs = _Replay.apply(turn, *captured.parameters)
        return tree_unflatten(list(outputs), captured.spec)

    def _captured(
        self, model: Module, ids: Tensor, labels: Tensor | None, loss_reduction: str
    ) -> Captured | None:
        graphs, kind = self.graphs, ids.device.type
        if not graphs.hold(model):
            self.given = None
            if is_managed(model):
                graphs.structure = None  # to be looked at again
                raise ValueError(
                    "model.graphs must be False under FSDP, which moves parameters about, got True:"
                    " DistributedDataParallel goes with it"
                )
        if not graphs.structure.trained:
            return None
        if reason := graphs.structure.hooked(parameters=False):
            graphs.kept.clear()
            self._warn(f"model.graphs has no effect: {reason}")
            return None
        last = self.last()
        if last is not None and not last.done:
            self._warn(
                "model.graphs: a forward runs eagerly while the backward of the one before may"
                " still come"
            )
            return None
        if self.given is not None and not self.given.take_back():
            self._warn(
                "model.graphs: a forward runs eagerly while gradients of a backward before are held"
                " outside of .grad; clone them"
            )
            return None
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = ids.shape, labels is None, loss_reduction, autocast
        name = f"a forward of ids of shape {tuple(ids.shape)}"
        captured = graphs.get(key, lambda: self._capture(model, ids, labels, loss_reduction), name)
        if captured is None and not self.compiled and model.ops_for(ids.device) is FUSED:
            # The stand-ins are those of the second turn. The first turn, which computes, follows.
            work = _Work(model, ids, labels, loss_reduction, graphs.structure.trained)
            compile_ahead(lambda: (work.forward(), work.backward()))
            self.compiled = True
        return captured

    def _warn(self, message: str):
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)

    def _capture(
        self, model: Module, ids: Tensor, labels: Tensor | None, loss_reduction: str
    ) -> Captured:
        ids = ids.clone(memory_format=torch.contiguous_format)
        if labels is not None:
            labels = labels.clone(memory_format=torch.contiguous_format)
        work = _Work(model, ids, labels, loss_reduction, self.graphs.structure.trained)
        forward, outputs = self.graphs.capture(work.forward)
        own = set(work.own.values())
        if any(leaf not in own for leaf in leaves(work.outputs)):
            raise RuntimeError("it trains a tensor that no module of the model has as a parameter")
        backward, gradients = self.graphs.capture(work.backward)
        return Captured(
            work.parameters,
            ids,
            labels,
            work.grad_outputs,
            forward,
            outputs,
            work.spec,
            work.differentiable,
            backward,
            gradients,
        )

    def backward(self, turn: Turn, grad_outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward under model.graphs has no gradients of gradients (create_graph=True):"
                " set model.graphs = False"
            )
        captured = turn.captured
        with self.lock:
            if turn.done:
                raise RuntimeError(
                    "a forward under model.graphs has one backward, got a second: set"
                    " model.graphs = False, or add up what backward is called on"
                )
            pairs = zip(grad_outputs, captured.differentiable, strict=True)
            needed = [gradient for gradient, has in pairs if has]
            copy_all(captured.grad_outputs, needed)
            self.graphs.replay(captured.backward)
            turn.done, self.given = True, captured
            # Autograd takes the memory of a detached tensor, which nobody else holds, for .grad.
            return [g if g is None else g.detach() for g in captured.gradients]


def leaves(outputs: list[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that a backward from outputs would leave gradients in."""
    nodes = {output.grad_fn for output in outputs}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            yield node.variable
        following = {after for after, _ in node.next_functions if after is not None} - nodes
        nodes |= following
        todo += following


class _Work:
    """Forward and backward as functions without arguments, on parameters of their own: other
    tensors of the same memory, which have no hooks, and no part in the user's autograd graph.
    """

    def __init__(
        self,
        model: Module,
        ids: Tensor,
        labels: Tensor | None,
        loss_reduction: str,
        trained: list[Parameter],
    ):
        self.model, self.ids, self.labels, self.loss_reduction = model, ids, labels, loss_reduction
        self.parameters = trained
        self.own = {p: Parameter(p.detach()) for p in trained}
        self.outputs = self.grad_outputs = None

    def forward(self) -> list[Tensor]:
        torch.clear_autocast_cache()  # a region that is open has copies of weights in it
        with self._own_parameters():
            options = dict(return_loss=True, loss_reduction=self.loss_reduction, labels=self.labels)
            plan = self.model.plan(checked=True)
            outputs = type(self.model).forward(self.model, self.ids, **options, plan=plan)
        torch.clear_autocast_cache()
        flat, self.spec = tree_flatten(outputs)
        self.differentiable = [output.requires_grad for output in flat]
        self.outputs = [output for output in flat if output.requires_grad]
        if self.grad_outputs is None:
            self.grad_outputs = list(map(torch.empty_like, self.outputs))
        return [output.detach() for output in flat]

    def backward(self) -> list[Tensor | None]:
        off = torch.autocast(self.ids.device.type, enabled=False)
        with self._own_parameters(), off:  # checkpoints run their part of the forward again
            gradients = torch.autograd.grad(
                self.outputs, list(self.own.values()), self.grad_outputs, allow_unused=True
            )
        self.outputs = None
        seen, alone = set(), []
        for gradient in gradients:
            if gradient is not None:
                # a gradient is added to and clipped in place, so no two parameters may share one
                alone.append(gradient.clone() if gradient.data_ptr() in seen else gradient)
                seen.add(gradient.data_ptr())
            else:
                alone.append(None)
        return alone

    @contextmanager
    def _own_parameters(self) -> Iterator[None]:
        replaced = []
        try:
            for module in self.model.modules():
                parameters = parameters_of(module)
                for name, p in parameters.items():
                    if (own := self.own.get(p)) is not None:
                        replaced.append((parameters, name, p))
                        parameters[name] = own
            yield
        finally:
            for parameters, name, p in replaced:
                parameters[name] = p


_graphed = WeakKeyDictionary()  # model: GraphedLoss; not on the model: copies and pickles
_lock = threading.Lock()


def replay(model: Module, ids: Tensor, labels: Tensor | None, loss_reduction: str):
    """Return what `model(ids, return_loss=True, ...)` does, by graphs; None where it has to run
    eagerly: where nothing is trained, on a CPU, or where someone looks at its ops.

    Raises:
        TypeError, ValueError: as a forward; ValueError, too, for a model under FSDP.
    """
    if (
        torch.compiler.is_compiling()
        or not (model.training and torch.is_grad_enabled() and runs_graphs(model.device))
        or count_dispatch_modes()
        or transforms_active()
        or packs_saved_tensors(ignore_tracing=False)
    ):
        return None
    checked = not model.checked
    ids = model.check_ids(ids, return_loss=True, checked=checked)
    labels = None if labels is None else model.check_labels(labels, ids, checked)
    with _lock:
        graphed = _graphed.get(model)
        if graphed is None or graphed.device != ids.device:
            graphed = _graphed[model] = GraphedLoss(ids.device)
    return graphed(model, ids, labels, loss_reduction)


def runs_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def is_managed(model: Module) -> bool:
    """Return whether FSDP, of either kind, has a model's parameters in its hands."""
    managed = any(map(is_managed_by_fsdp, modules_below(model)))
    return managed or any(map(is_sharded, parameters_below(model)))
