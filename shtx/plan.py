"""Plans a forward: the ops that it runs, and the modules that it has to call.

Layers hand the weights of their modules to ops, which do in one pass what the modules would do in
several. That is right only while a module is *plain*: of the type that its layer made, with the
same options, without hooks, without sharding of its own, its weight an ordinary tensor. Whatever a
tool has changed (an adaptor in its place, a hook, a quantized weight) is *called*: the op that the
module belongs to runs as its reference, module by module, and everything else stays as it is.
Parametrized modules are plain: the value of their weight is what counts.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from shtx.internals import (
    COMPILED,
    HOOKS,
    MODULES,
    PARAMETERS,
    any_global_hooks,
    modules_of,
    parameters_below,
    parameters_of,
)
from shtx.ops import REFERENCE, narrow_copies, narrow_weights, resolve

ORDINARY = (Parameter, Tensor, type(None))
CAST = (nn.Linear, nn.Embedding, nn.Conv1d)  # products read their weights in autocast's dtype

# attributes that decide on the result of calling a module, besides weights; layers add theirs
OPTIONS = {
    nn.Linear: lambda m: parameters_of(m).get("bias") is None,
    nn.Embedding: lambda m: (m.padding_idx, m.max_norm, m.scale_grad_by_freq, m.sparse),
    nn.LayerNorm: lambda m: (m.eps, m.normalized_shape, parameters_of(m).get("bias") is None),
    nn.Conv1d: lambda m: (
        (m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode),
        parameters_of(m).get("bias") is None,
    ),
    nn.GELU: lambda m: m.approximate,
    nn.Dropout: lambda m: m.p,
    nn.Sequential: len,
}
no_options = lambda m: None
FORWARDS = {kind: kind.forward for kind in OPTIONS}


class Made(NamedTuple):
    """A module as its layer made it."""

    path: tuple[str, ...]  # from the layer
    kind: type
    options: object
    is_cast: bool  # whether its weight is cast ahead of the op that reads it


class Layer(Module):
    """A module whose `forward` is upstream's, module by module, and which knows how it was made.

    Attributes:
        impl: of its own calls; "auto" unless the model it belongs to has another.
        takes_plan: whether `forward` takes a plan as its last argument.
        cast_by_ops: paths of modules whose weights the op that reads them casts itself.
    """

    impl = "auto"
    takes_plan = False
    cast_by_ops = ()

    def remember(self):
        """Take what is here for plain from now on. It ends a constructor."""
        self.made = [
            Made(
                path,
                kind := type(module),
                OPTIONS.get(kind, no_options)(module),
                kind in CAST and ".".join(path) not in self.cast_by_ops,
            )
            for path, module in descendants(self)
        ]

    def plan_alone(self, x: Tensor) -> "Plan":
        """Return how a call of this layer by itself runs."""
        return Plan(resolve(self.impl, x.device), look(self))


def descendants(layer: Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Module]]:
    """Yield the modules below, down to those that are layers themselves, with their paths."""
    for name, module in modules_of(layer).items():
        if module is not None:
            yield (*path, name), module
            if not isinstance(module, Layer):
                yield from descendants(module, (*path, name))


class Found(NamedTuple):
    """The result of looking at a tree of modules."""

    called: dict[Module, str]  # with the reason
    sharded: dict[Layer, str]  # by FSDP2, and nothing else: called, too, but with the plan
    weights: list[Parameter]  # those of plain modules, which products read


def look(layer: Layer) -> Found:
    """Find the modules below a layer that have to be called, and the weights of the others."""
    found = Found({}, {}, [])
    everything = "is seen by global hooks" if any_global_hooks() else None
    for kind, forward in FORWARDS.items():
        if kind.forward is not forward:
            everything = f"may be a {kind.__name__}, whose forward was replaced"
    _look(layer, found, everything)
    return found


def _look(layer: Layer, found: Found, everything: str | None):
    for path, kind, options, is_cast in layer.made:
        module = layer
        for name in path:
            module = modules_of(module).get(name)
            if module is None:  # taken out, or below what has been replaced
                break
        else:
            reason = everything or why_called(module, kind, options)
            if reason is not None:
                takes_plan = getattr(kind, "takes_plan", False) and not everything
                if takes_plan and why_called(module, kind, options, sharded_is_plain=True) is None:
                    found.sharded[module] = reason
                else:
                    found.called[module] = reason
            elif is_cast and type(weight := parameters_of(module).get("weight")) is Parameter:
                found.weights.append(weight)
            if isinstance(module, Layer):
                _look(module, found, everything)


def why_called(module: Module, kind: type, options, sharded_is_plain: bool = False) -> str | None:
    """Say why a module is not plain; None if it is."""
    state, actual = module.__dict__, type(module)
    if actual is not kind and not _is_variant(actual, kind, state, sharded_is_plain):
        was, now = kind.__name__, actual.__name__
        if was == now:  # as of PEFT's Linear
            was, now = (f"{each.__module__}.{each.__qualname__}" for each in (kind, actual))
        return f"is a {now}, not the {was} that it was made"
    for name in HOOKS:
        if state[name] and not (sharded_is_plain and all(map(_shards, state[name].values()))):
            return f"has {name[1:].replace('_', ' ')}"
    if "forward" in state:
        return "has a forward of its own"
    if state.get(COMPILED) is not None:
        return "is compiled on its own"
    if (get := OPTIONS.get(kind)) is not None and get(module) != options:
        return f"has other options or buffers than it was made with: {module}"
    for name, p in state[PARAMETERS].items():
        # a sharded weight is whole once the module around it has been called
        if type(p) not in ORDINARY and not is_sharded(p):
            return f"has a {name} that is a {type(p).__name__}"
    if "weight" in state:
        return "has a weight that is computed before each call"
    return None


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a process holds a part of a parameter, as under FSDP2."""
    return type(parameter).__name__ == "DTensor"


def check_in_memory(model: Module):
    """Raise a ValueError for a model with a parameter that has no values."""
    if any(p.is_meta for p in parameters_below(model)):
        name = next(name for name, p in model.named_parameters() if p.is_meta)
        raise ValueError(
            f"model must be in memory, got {name} on meta: model.to_empty(device=...) and"
            " model.init_weights(), then model.load_state_dict(...), give it values"
        )


def _is_variant(actual: type, kind: type, state: dict, sharded_is_plain: bool) -> bool:
    """Return whether a class is one that parametrizations or FSDP2 put in the place of `kind`."""
    bases = actual.__mro__
    if kind not in bases:
        return False
    between = bases[1 : bases.index(kind)]
    if not between:
        return "parametrizations" in state[MODULES]
    return sharded_is_plain and between[0].__name__ == "FSDPModule"


def _shards(hook) -> bool:
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith("torch.distributed.")


# takes the name of what is left, (layer, level, what), and the tensor (B, M, ...)
Take = Callable[[tuple[int, int, str], Tensor], None]


class Plan:
    """The plan of one forward.

    Attributes:
        ops: what layers call.
        called: modules that have to be called, with the reason.
        sharded: layers that have to be called with the plan.
        copies: narrow copies of weights, which go with the plan.
        checked: whether ids are known to be in range.
        take: is handed what tokens to come read of this pass; None: nobody asks for it.
        place: (layer, level) of the block that runs by this plan.
    """

    def __init__(
        self,
        ops: SimpleNamespace,
        found: Found,
        copies: dict | None = None,
        checked: bool = False,
        take: Take | None = None,
    ):
        self.ops, self.called, self.sharded = ops, found.called, found.sharded
        self.copies, self.checked = copies, checked
        self.take, self.place = take, (None, None)

    def reads(self, *modules: Module) -> bool:
        """Return whether the weights of all of them may be read."""
        return not self.called or not any(m in self.called for m in modules)

    def reads_all(self, module: Module) -> bool:
        """Return whether the weights of a module and of all below it may be read."""
        return not self.called or self.reads(*module.modules())

    def at(self, layer: int, level: int) -> "Plan":
        """Return the plan of a block, for whose names `leave` has to know its place."""
        if self.take is None:
            return self
        plan = copy(self)
        plan.place = layer, level
        return plan

    def leave(self, what: str, x: Tensor) -> None:
        """Hand on what tokens to come read of a level in a layer: x (B, M, ...)."""
        if self.take is not None:
            self.take((*self.place, what), x)

    def linear(self, module: Module, x: Tensor) -> Tensor:
        """A linear layer without a bias."""
        return self.ops.linear(x, module.weight) if self.reads(module) else module(x)

    def narrow_weights(self) -> AbstractContextManager:
        """Return a context in which ops of this thread take the narrow copies of weights."""
        return nullcontext() if self.copies is None else narrow_weights(self.copies)


def make_plan(model: Layer, ops: SimpleNamespace, checked: bool, take: Take | None = None) -> Plan:
    """Plan a forward of a whole model, and cast its weights, in one call, where fused ops do."""
    found = look(model)
    copies = None
    device = model.device.type
    if ops is not REFERENCE and not torch.compiler.is_compiling():
        copies = {}
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            wider = [w for w in found.weights if w.dtype == torch.float32 and w.dtype != dtype]
            copies = narrow_copies(wider, dtype) if wider else {}
    return Plan(ops, found, copies, checked, take)


def unfused(model: Layer) -> dict[str, str]:
    """Name the modules that a forward calls by themselves, and not within a fused op.

    Args:
        model: a HierarchicalTransformer, or a layer of one.

    Returns:
        the reason for each, by the module's name within `model`; empty if everything may be fused.
    """
    called = look(model).called
    return {name: called[m] for name, m in model.named_modules() if m in called} if called else {}
