"""Compiles, for a GPU that need not be here, every kernel that a training step of the fused model,
or a token that it generates, launches there.

    python offline.py cuda 90 bfloat16
    python offline.py cuda 90 bfloat16 wide

Launches compile and go no further, so the numbers are garbage; the kernels, their specialisation
and their constants are those of a real step. All of them compile side by side, ahead of a second
turn, which finds them. Prints a JSON line per kernel: registers and bytes of local memory (spills).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from shtx import HierarchicalTransformer, ops
from shtx.generation.decoder import Decoder
from shtx.next_latent import HierarchicalTransformer as NextLatent
from shtx_kernels import _gelu, _gelu_hopper
from shtx_kernels.launch import compile_only
from shtx_kernels.rotary_attention import library

TOKENS = 1024
# vocabularies, of which a row of logits is one tile, or several, and the model
# a level for each pair of ways that attention goes forward and backward, one of them strided
MODELS = {
    "narrow": (
        (256, 5000),
        dict(
            dim=512,
            dim_head=64,
            heads=8,
            hierarchies=(1, 2, 4),
            hierarchical_stride=(1, 1, 2),
            window_sizes=(64, 128, None),
        ),
    ),
    # the widths of the benchmarks' configuration E, and less compression: products take minutes
    "wide": (
        (256,),
        dict(
            dim=(2048, 4096),
            dim_head=128,
            heads=(16, 32),
            hierarchies=(1, 2),
            hierarchical_stride=(1, 2),
            window_sizes=(256, None),
        ),
    ),
}


class NoDevice:
    """A driver that gives Triton what it asks for up to the point of launching."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def resources(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def main(backend: str, arch: str, dtype: str, model: str = "narrow"):
    cuda = backend == "cuda"
    target = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
    driver.set_active(NoDevice(target))
    ops.why_not_fused = lambda device: None
    ops.compile_ahead(lambda: launch_all(dtype, model))
    compiled = {}

    def look_up(self, *args, grid, warmup, _run=JITFunction.run, **options):
        kernel = _run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel

    def compile_late(self, *args, _compile=JITFunction._do_compile):
        _compile(self, *args)  # which says what is wrong, if it is the kernel
        raise AssertionError(f"{self.__name__} was not compiled ahead")

    JITFunction.run, JITFunction._do_compile = look_up, compile_late
    with compile_only():
        launch_all(dtype, model)
    for kernel in compiled.values():
        row = dict(kernel=kernel.metadata.name, shared=kernel.metadata.shared)
        if cuda:
            row |= resources(kernel.asm["cubin"])
        else:
            row |= dict(bytes=len(kernel.asm["hsaco"]))
        print(json.dumps(row))


def launch_all(dtype: str, name: str):
    vocabularies, shapes = MODELS[name]
    for num_tokens in vocabularies:
        options = dict(num_tokens=num_tokens, depth=1, seq_len=TOKENS, impl="fused")
        model = HierarchicalTransformer(**options, **shapes)
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss, _ = model(torch.ones(2, TOKENS + 1, dtype=torch.long), return_loss=True)
        loss.backward()
        for batch, tokens in ((1, TOKENS), (4, TOKENS), (64, 128)):
            decoder = Decoder(model, batch, tokens, getattr(torch, dtype))
            logits = decoder.step()
            noise = torch.ones_like(logits)[:, None]
            decoder.ops.decode.sample(decoder.position, logits, noise, 1.0, 9, 0.9, decoder.ids)

    levels = dict(dim=(512, 256), hierarchies=(1, 4), hierarchical_stride=(1, 2), window_sizes=0)
    model = NextLatent(num_tokens=256, depth=1, num_rollouts=2, impl="fused", **levels)
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        loss, _ = model(torch.ones(2, TOKENS + 1, dtype=torch.long), return_loss=True)
    loss.backward()

    # the passes around PyTorch's attention, which a CPU is not sent to
    qkv = torch.empty(2, TOKENS, 3 * 8 * 64, dtype=getattr(torch, dtype))
    classes, table = qkv.new_empty(3, 2, TOKENS, 8, 64), torch.empty(4096, 64)
    for back in (False, True):
        library.rotate_classes(qkv, classes, table, 1, True, False, back)
        library.regroup(qkv[..., : 8 * 64], classes[0], 1, back)
    if dtype == "bfloat16" and driver.active.get_current_target().arch == 90:
        launch_products()


def launch_products():
    """Both twins of the products with GELU, of which one is chosen by the version of Triton."""
    x, w = torch.empty(TOKENS, 512, dtype=torch.bfloat16), torch.empty(2048, 512).bfloat16()
    u, a, kept = x.new_empty(3, TOKENS, 2048)
    for slope in (False, True):
        _gelu.within_product(x, w, u, a, slope=slope)
        _gelu.within_product(x, w.T.contiguous(), u, a, kept=kept, slope=slope)
    _gelu_hopper.within_product(x, w, kept, a, backward=False)
    _gelu_hopper.within_product(x, w.T.contiguous(), kept, a, backward=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
