"""`shtx info`: versions, device, fused ops, whether these agree with their references, and which
modules of a checkpoint's model run unfused."""

import argparse
import math
import os
import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from shtx import HierarchicalTransformer, __version__, ops
from shtx.generation.decoder import Decoder
from shtx.internals import tree_leaves, tree_map_only
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer
from shtx.plan import unfused

# relative to the reference's norm; fp32 differs in the order of sums alone
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Between them they call every op.
MODELS = (
    partial(
        HierarchicalTransformer,
        dim=(32, 48, 64),
        hierarchies=(1, 2, 8),
        hierarchical_stride=(1, 1, 4),
        window_sizes=8,
    ),
    partial(
        HierarchicalTransformer,
        dim=48,
        hierarchies=(1, 4),
        hierarchy_merge_all=True,
        predict_use_all_hierarchy=True,
    ),
    partial(
        NextLatentTransformer,
        dim=(32, 48),
        hierarchies=(1, 2),
        window_sizes=8,
        num_rollouts=2,
        detach_summaries=False,
    ),
)


def main(argv: list[str]) -> int:
    """Print what this machine runs.

    Returns:
        the exit status: 1 if --check found an op that disagrees with its reference, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="shtx info",
        description="Versions, device, and which ops run fused.",
        epilog="examples: shtx info, shtx info --check, shtx info --checkpoint runs/enwik8",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare values and gradients of fused ops and references; exit 1 if they differ",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="which modules of its model run unfused, and why; a run, for its newest checkpoint, or"
        " one of its checkpoints",
    )
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in versions(device).items():
        print(f"{name:<8}{value}")

    print(f"\n{'op':<24}{'impl=auto':<12}why not fused")
    for name in (*sorted(ops.REFERENCE_OPS), *map("decode.{}".format, ops.TOKEN_OPS)):
        reason = why_reference(name, device)
        print(f"{name:<24}{'reference' if reason else 'fused':<12}{reason or ''}".rstrip())
    if options.checkpoint:
        describe(Path(os.path.abspath(options.checkpoint)), device)
    return check(device) if options.check else 0


def describe(path: Path, device: torch.device):
    """Print how the model of a checkpoint runs by these ops."""
    from shtx.train.trainer import load_model  # which the extra `train` has

    model, checkpoint = load_model(path, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{checkpoint.path}: {parameters:,} parameters, trained with", end=" ")
    print(f'impl="{checkpoint.config["run"]["impl"]}"')
    called = unfused(model)
    if not called:
        print("every module is as it was made: the ops above are all that runs")
        return
    width = 2 + max(map(len, called))
    print(f"{'module':<{width}}why it runs by itself, and not within a fused op")
    for name, reason in called.items():
        print(f"{name:<{width}}{reason}")


def versions(device: torch.device) -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        name = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory >> 30} GiB"
        )
    return {
        "shtx": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": triton,
        "CUDA": torch.version.cuda or "not in this build of torch",
        "device": name,
    }


def why_reference(name: str, device: torch.device) -> str | None:
    """Return the reason why impl="auto" does not run the fused op on `device`; None if it does."""
    if ops.FUSED_OPS and name in ops.REFERENCE_OPS and name not in ops.FUSED_OPS:
        return "has no fused form"
    if reason := ops.why_not_fused(device):
        return reason
    return None if device.type == "cuda" else 'impl="fused" runs it in Triton\'s interpreter'


def check(device: torch.device) -> int:
    """Compare the fused ops with their references, on what a small model hands them."""
    if reason := ops.why_not_fused(device):
        print(f"\nnothing to check: {reason}")
        return 0
    print(f"\n{'op':<24}{'dtype':<12}{'relative error':<18}{'allowed':<10}")
    failed = False
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        errors = compare(device, dtype)
        for name in sorted(errors, key=lambda name: ("." in name, name)):
            error = max(errors[name], key=lambda e: (math.isnan(e), e))
            agrees = error <= ALLOWED[dtype]
            failed |= not agrees
            print(
                f"{name:<24}{str(dtype).removeprefix('torch.'):<12}{error:<18.1e}"
                f"{ALLOWED[dtype]:<10.0e}{'ok' if agrees else 'DISAGREES'}"
            )
    return int(failed)


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """The relative errors of each fused op, of all values and gradients in small models' losses,
    and of what each op of a token writes while they generate.
    """
    errors = {}

    def note(name: str, ours: list[Tensor], theirs: list[Tensor]):
        for a, b in zip(ours, theirs, strict=True):
            a, b = a.double(), b.double()
            error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
            errors.setdefault(name, []).append(error)

    def both(name: str):
        fused, reference = getattr(ops.FUSED, name), getattr(ops.REFERENCE, name)

        def op(*args, **kwargs):
            note(name, *(outputs_and_gradients(f, args, kwargs) for f in (fused, reference)))
            return reference(*args, **kwargs)

        return op

    def both_of_a_token(name: str):
        fused, reference = getattr(ops.FUSED.decode, name), getattr(ops.REFERENCE.decode, name)
        tensors = lambda args: [t for t in tree_leaves(args) if isinstance(t, Tensor)]

        def op(*args):
            clones = {}  # a tensor may be read and written in one call
            clone = lambda t: clones.setdefault(id(t), t.clone())
            copies = tree_map_only(Tensor, clone, args)
            fused(*copies)
            reference(*args)
            note(f"decode.{name}", tensors(copies), tensors(args))

        return op

    compared = {name: both(name) for name in ops.FUSED_OPS}
    compared["decode"] = SimpleNamespace(**{n: both_of_a_token(n) for n in ops.TOKEN_OPS})
    namespace = SimpleNamespace(**vars(ops.REFERENCE) | compared)
    torch.manual_seed(0)
    for make in MODELS:
        model = make(num_tokens=256, depth=1, seq_len=64, heads=2).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            ids = torch.randint(0, 256, (2, 64), device=device)
            model(ids, return_loss=True, plan=model.plan(namespace))
        for batch in (1, 2):  # for which there are different kernels
            decoder = Decoder(model, batch, 64, dtype, namespace)
            noise = torch.rand(batch, 4, 256, device=device)
            for _ in range(5):  # to the second token of a level that has every fourth
                logits = decoder.step()
                namespace.decode.sample(decoder.position, logits, noise, 1.0, 9, 0.9, decoder.ids)
    return errors


def outputs_and_gradients(op, args: tuple, kwargs: dict) -> list[Tensor]:
    """Return what an op computes, and its gradients for the same gradients of outputs at each call,
    all in fp64.
    """
    fresh = lambda t: t.detach().requires_grad_(t.requires_grad)
    args, kwargs = tree_map_only(Tensor, fresh, (args, kwargs))
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    outputs = [t for t in tree_leaves(op(*args, **kwargs)) if isinstance(t, Tensor)]
    roots = [t for t in outputs if t.requires_grad]
    generator = torch.Generator(roots[0].device).manual_seed(1)
    douts = [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in roots]
    grads = torch.autograd.grad(roots, inputs, douts, materialize_grads=True)
    return [t.detach().double() for t in (*outputs, *grads)]
