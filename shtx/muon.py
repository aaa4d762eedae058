"""Muon, as torch.optim.Muon, whose steps a CUDA graph can hold.

    B <- momentum B + (1 - momentum) G            what a matrix W keeps, from its gradient G
    U = (1 - momentum) G + momentum B             (Nesterov), else B
    W <- (1 - lr decay) W - lr scale NS(U)

NS(U) is about the nearest matrix with orthogonal rows or columns: five steps of

    X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X

in bf16, from U of norm 1. Matrices of one shape take them side by side, in one product. The
learning rate may be a tensor on the device: nothing waits for it.
"""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from shtx.internals import add_all, lerp_all, scale_all
from shtx.plan import is_sharded

# The coefficients of https://kellerjordan.github.io/posts/muon/: the steepest at zero
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7

# the length of a step, for a matrix of A rows and B columns
SCALES = {
    "original": lambda A, B: math.sqrt(max(1, A / B)),
    "match_rms_adamw": lambda A, B: 0.2 * math.sqrt(max(A, B)),
}


class Muon(Optimizer):
    """torch.optim.Muon with the same state, for a step that is captured (`TrainStep`).

    Args:
        params: (A, B) matrices, or groups of them.
        lr: a number, or a 0-dim tensor on the device of the matrices.
        weight_decay: decoupled: lr times this times a matrix is taken off.
        momentum: of gradients, in [0, 1).
        nesterov: look ahead by one step of momentum.
        adjust_lr_fn: "original", or "match_rms_adamw": a step as long as AdamW's, so that its
            learning rates and weight decay can stay.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.

    Source: torch/optim/_muon.py of PyTorch 2.13.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "original",
    ):
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if adjust_lr_fn not in SCALES:
            allowed = " or ".join(map(repr, SCALES))
            raise ValueError(f"adjust_lr_fn must be {allowed}, got {adjust_lr_fn!r}")
        options = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
        super().__init__(params, dict(**options, adjust_lr_fn=adjust_lr_fn, capturable=True))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim != 2 or not p.is_floating_point():
                raise ValueError(
                    f"params must be matrices of floating point, got shape {tuple(p.shape)},"
                    f" {p.dtype}"
                )
            if is_sharded(p):
                raise ValueError(
                    "params must be whole, got one of which this process has a part: a step takes"
                    " the whole matrix"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns what `closure` does, if that is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.dtype), []).append(p)
            for (shape, _), matrices in by_shape.items():
                self._step(group, SCALES[group["adjust_lr_fn"]](*shape), matrices)
        return loss

    def _step(self, group: dict, scale: float, matrices: list[Tensor]) -> None:
        """Update all matrices of one shape and dtype."""
        lr, momentum = group["lr"], group["momentum"]
        gradients = [p.grad for p in matrices]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        kept = [self.state[p]["momentum_buffer"] for p in matrices]
        lerp_all(kept, gradients, 1 - momentum)
        updates = torch.stack(kept)
        if group["nesterov"]:
            updates = torch.stack(gradients).lerp(updates, momentum)
        updates = orthogonal(updates.bfloat16())
        scale_all(matrices, 1 - lr * group["weight_decay"])
        updates = updates.to(matrices[0].dtype) * (-lr * scale)
        add_all(matrices, list(updates))


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz of (..., A, B) matrices in their own dtype; `x` is written over."""
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x /= x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
