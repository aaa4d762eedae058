"""Private interfaces of PyTorch and Triton. No other page of this package uses one.

They were tested in PyTorch 2.11 and 2.13, with Triton 3.6 and 3.9. Each says here what becomes of
the package in a version that lacks it: it takes a slower way, or the call that needs it raises.
"""

import sys
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

try:
    import triton
    from triton.runtime._async_compile import active_mode
except ImportError:  # without Triton there are no launches, and other versions launch themselves
    active_mode = None


def find(path: str, otherwise: Callable) -> Callable:
    """The function of PyTorch at a dotted path; `otherwise` in a version that has none there."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        return otherwise


def unknown_transforms() -> bool:
    raise NotImplementedError(
        "shtx cannot tell whether torch.func transforms a call: PyTorch must have"
        " torch._C._are_functorch_transforms_active, as versions 2.11 to 2.13 do, got"
        f" {torch.__version__}"
    )


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


# Whether a transform of torch.func (vmap, grad, jvp, ...) acts on calls. Otherwise: an error.
transforms_active = find("_C._are_functorch_transforms_active", unknown_transforms)

# Whether the backward that runs in this thread keeps its graph for another one. Otherwise: it may.
keeps_graph = find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)

# Counts the modes that see the dispatcher's calls. Otherwise: ops always go through it.
count_dispatch_modes = find("_C._len_torch_dispatch_stack", lambda: 1)

# Copies each of a list of tensors in a few launches. Otherwise: one by one.
copy_all = find("_foreach_copy_", copy_each)

_is_profiled = find("_C._autograd._profiler_enabled", lambda: True)
_tracing_state = find("_C._get_tracing_state", lambda: None)
_top_hooks = find("_C._autograd._top_saved_tensors_default_hooks", lambda ignore_tracing: True)


def is_recorded() -> bool:
    """Return whether a profiler or a tracer writes down the dispatcher's calls. On other versions
    it may, so that ops go through the dispatcher.
    """
    return _is_profiled() or _tracing_state() is not None


def packs_saved_tensors(ignore_tracing: bool) -> bool:
    """Return whether hooks take what a forward saves, as those of checkpoints do. On other versions
    they may.
    """
    return _top_hooks(ignore_tracing) is not None


_untransformed = getattr(super(torch.autograd.Function, torch.autograd.Function), "apply", None)


def apply_untransformed(function: type[torch.autograd.Function], *args):
    """function.apply(*args) without its handling of torch.func, which takes most of its time.
    Otherwise: with it.
    """
    if _untransformed is None:
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def tell_inductor(op: str) -> None:
    """Name an op among those that Inductor calls as they are.

    For any other op it writes a line to its log at each call, whose text doubles with every op that
    takes the result of another. Otherwise: it does.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    getattr(lowering, "FALLBACK_ALLOW_LIST", set()).add(op)


# Whether the two attention cores below are there. Otherwise: the kernels of this package.
HAS_ATTENTION_CORES = all(
    hasattr(torch.ops.aten, name)
    for name in ("_scaled_dot_product_cudnn_attention", "_flash_attention_backward")
)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of cuDNN: out, in the layout of q (B, H, n, E), and lse (B, H, n)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return out, lse.squeeze(-1)


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of causal attention by FlashAttention 2; lse (B, H, n), all else (B, n, H, E)."""
    n = q.shape[1]
    seed = q.new_empty(2, dtype=torch.uint64)  # for dropout, which there is none of
    return torch.ops.aten._flash_attention_backward.default(
        *(dout, q, k, v, out, lse, None, None, n, n, 0.0, True, seed, seed), scale=scale
    )


def launches_are_known() -> bool:
    """Return whether Triton's launches are known to end as `launch.Kernel` has them end. If not,
    Triton launches all kernels itself.
    """
    if active_mode is None or torch.version.hip is not None:
        return False
    return triton.__version__.startswith(("3.6.", "3.9."))


def gluon_is_known() -> bool:
    """Return whether kernels in Gluon, which is experimental, were run with this version of Triton;
    with others, their twins in Triton run.
    """
    return torch.version.hip is None and triton.__version__.startswith("3.6.")


def is_watched(kernel) -> bool:
    """Return whether a hook sees the launches of a kernel, or another thread compiles it."""
    if active_mode.get() is not None or kernel.pre_run_hooks:
        return True
    hooks = triton.knobs.runtime
    for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # one function, or a chain of several
            return True
    return False


def parameters_of(kernel) -> tuple[list[bool], list[str]]:
    """Return, for each tensor and number of a kernel, whether it is compiled for the value, and the
    names of its constants.
    """
    special = [not p.do_not_specialize for p in kernel.params if not p.is_constexpr]
    return special, [p.name for p in kernel.params if p.is_constexpr]


def launcher_of(compiled) -> tuple[Callable, tuple, bool]:
    """Return the function that launches a compiled kernel, what it takes between the stream and the
    kernel's arguments, and whether it takes those arguments as one tuple.

    It is what Triton's launcher calls in the end, or that launcher itself where a launch has to
    allocate memory first.
    """
    run, metadata, hooks = compiled.run, compiled.packed_metadata, (None, None, None)
    allocates = lambda: run.global_scratch_size or run.profile_scratch_size
    if type(run).__name__ != "CudaLauncher" or allocates() or getattr(run, "gsan_enabled", False):
        return run, (compiled.function, metadata, *hooks), False
    options = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    scratch = None, None
    if hasattr(run, "kernel_signature"):  # Triton 3.9
        types = run.arg_annotations, run.kernel_signature
        return run.launch, (*options, metadata, *hooks, *scratch, *types), True
    return run.launch, (*options, *scratch, metadata, *hooks), False
