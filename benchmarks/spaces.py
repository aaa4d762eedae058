"""The values of the kernels' constants that `python -m benchmarks.search` times, by page.

Every constant of `shtx_kernels` is in one of the two tables here; those of attention's tiles, whose
search has a page of its own, are in neither.
"""

import sys
from importlib import import_module
from itertools import product
from typing import NamedTuple

MIB = 2**20


class Space(NamedTuple):
    """The values that are tried in place of a page's constants, one choice after the other."""

    benches: tuple[str, ...]  # benchmarks that run the page's kernels
    choices: list[dict]  # values of constants, by name
    configs: tuple[str, ...] = ("A", "B", "C", "D")

    @property
    def constants(self) -> set[str]:
        return {name for choice in self.choices for name in choice}


def grid(**axes) -> list[dict]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def each(**axes) -> list[dict]:
    """One constant at a time."""
    return [{name: value} for name, values in axes.items() for value in values]


def table(name: str, **axes) -> list[dict]:
    """A constant that is a dict."""
    return [{name: sizes} for sizes in grid(**axes)]


ROWS = grid(TILE=(1024, 2048, 4096), WARP_TILE=(256, 512, 1024, 2048))
SPACES = {
    "_cross_entropy": Space(
        ("linear_cross_entropy", "reconstruction_loss"),
        each(
            WORKSPACE=[(least * MIB, 4 * least * MIB) for least in (20, 40, 80)],
            ENOUGH=(2048, 4096, 8192),
            BLOCK_V=(4096, 8192, 16384),
            TILE=(1024, 2048, 4096),
            WARP_TILE=(512, 1024, 2048),
            SCALED=(2048, 4096, 8192),
        ),
    ),
    "_gelu": Space(
        ("feed_forward",),
        table("PASS", TILE=(1024, 2048, 4096), num_warps=(4, 8))
        + table(
            "PRODUCT",
            BLOCK_M=(128,),
            BLOCK_N=(128, 256),
            BLOCK_K=(32, 64),
            num_warps=(4, 8),
            num_stages=(3, 4),
            maxnreg=(128, 255),
        )
        + each(
            RESIDENT=(1, 2), GROUP=(4, 8, 16), WIDE=(128, 256, 512, 1024), DEEP=(128, 512, 1024)
        ),
    ),
    "_gelu_hopper": Space(
        ("feed_forward",),
        grid(BLOCK_M=(64, 128), BLOCK_N=(128, 256), BLOCK_K=(64,), STAGES=(3, 4, 5))
        + each(GROUP=(4, 8, 16)),
    ),
    "_one_hot": Space(
        ("token_embedding", "causal_compress"),
        table("CONFIG", BLOCK_V=(16, 32), BLOCK_R=(256, 512, 1024), num_warps=(4, 8))
        + each(ONE_HOT=(0, 256, 1024, 4096)),
    ),
    "_rows": Space(("norm_token_shift",), each(LANES=(128, 256, 512), ROUNDS=(2, 4, 8))),
    "_sums": Space(
        ("norm_token_shift", "causal_compress"),
        table("FEW", BLOCK_R=(32, 64), BLOCK_C=(16, 32), num_warps=(4, 8))
        + table("MANY", BLOCK_R=(32, 64), BLOCK_C=(16, 32), num_warps=(4, 8))
        + each(ALONE=(550, 1100, 2200), PROGRAMS=(32, 64, 128)),
    ),
    "causal_compress.kernels": Space(
        ("causal_compress",),
        table("CONFIG", BLOCK_R=(32, 64, 128), num_warps=(4, 8))
        + each(COLUMNS=(32, 64, 128), TAPS_TILE=(4096, 8192, 16384)),
    ),
    "chunk_summary": Space(("chunk_summary",), ROWS),
    "decode._device": Space(("generate",), each(MAX_ROWS=(32, 64, 128)), ("A", "B")),
    "decode._many": Space(
        ("generate",),
        table("DEEP", BLOCK_O=(16, 32, 64), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(4, 8))
        + table("SHALLOW", BLOCK_O=(16, 32), BLOCK_K=(64, 128, 256), num_warps=(4, 8))
        + each(FETCHED=(64, 1024, 4096)),
        ("A", "C"),
    ),
    "decode.attend": Space(
        ("generate",),
        each(KEYS=(8, 16, 32), WARPS=[((0, 4),), ((0, 8), (128, 4)), ((0, 4), (1024, 2))]),
        ("A", "B"),
    ),
    "decode.embed": Space(("generate",), each(ELEMENTS=(1024, 2048, 4096)), ("A", "B")),
    "decode.merge": Space(
        ("generate",),
        each(ROW_ELEMENTS=(4096, 8192, 16384))
        + table("DEEP", BLOCK_J=(16, 32), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(4, 8))
        + table("SHALLOW", BLOCK_J=(16, 32), BLOCK_K=(64, 128, 256), num_warps=(4, 8)),
        ("A", "B"),
    ),
    "decode.project": Space(
        ("generate",),
        grid(ROW_ELEMENTS=(4096, 8192, 16384), PROGRAMS=(132, 264, 528)),
        ("A", "B"),
    ),
    "decode.sample": Space(
        ("generate",), grid(BLOCK_V=(2048, 4096, 8192), HELD=(3, 5, 10)), ("A", "B")
    ),
    "hierarchical_ar_loss": Space(("hierarchical_ar_loss",), ROWS),
    "hierarchical_merge.backward": Space(
        ("hierarchical_merge",),
        each(
            TOKEN_TILES=[
                ((2**31, sizes),) for sizes in product((1024, 2048, 4096), (512, 1024), (264, 1056))
            ],
            STEP=(8, 16, 32),
        )
        + table("WEIGHT_CONFIG", BLOCK_R=(16, 32, 64), BLOCK_C=(64, 128), num_warps=(4, 8)),
    ),
    "hierarchical_merge.forward": Space(
        ("hierarchical_merge",),
        table("LEVEL_TILE", columns=(128, 256), elements=(1024, 2048, 4096), num_warps=(4, 8))
        + table("TOKEN_TILE", columns=(512, 1024), elements=(1024, 2048, 4096), num_warps=(4, 8)),
    ),
    "next_latent_loss.kernels": Space(("next_latent_loss",), ROWS),
    "norm_token_shift": Space(
        ("norm_token_shift",),
        grid(FWD_TILE=(1024, 2048, 4096, 8192), WARP_TILE=(512, 1024))
        + grid(BWD_TILE=(1024, 2048, 4096), BWD_PROGRAMS=(264, 528, 1056), STAGES=(1, 2, 3))
        + each(WIDE=(256, 512, 1024)),
    ),
    "rotary_attention.library": Space(
        ("rotary_attention",), each(BLOCK=(32, 64, 128), FROM=(256, 512, 1024))
    ),
}
UNTIMED = {  # what kernels can do, mathematics, and what belongs to cuBLAS or to Triton
    "_cross_entropy": {"ALIGN", "LN2", "LOG2_E", "ROUND"},
    "_gelu_hopper": {"COPYING", "MULTIPLYING", "REGISTERS"},
    "_rows": {"MAX_D"},
    "decode.sample": {"NONE"},
    "launch": {"KINDS", "LEAST", "MOST"},
    "next_latent_loss.kernels": {"COSINE", "SMOOTH"},
    "rotary_attention": {"LOG2_E", "MAX_E"},
    "rotary_attention.backward": {"LN2"},
    "rotary_attention.library": {"MOST"},
    "rotary_attention.rotations": {"MAX_TILE"},
    "rotary_attention.tokens": {"LOCAL", "STEP"},
    "rotary_attention.tiles": {"SHORT"},
}


def set_constants(page: str, values: dict):
    """Give constants of a page of shtx_kernels these values, before any kernel is made.

    A dict or a tuple that other pages import is changed there, too; numbers are not imported.
    """
    own = import_module(f"shtx_kernels.{page}")
    pages = [module for name, module in sys.modules.items() if name.startswith("shtx_kernels.")]
    for name, value in values.items():
        shipped = getattr(own, name)
        for module in pages:
            same = isinstance(shipped, dict | tuple) and vars(module).get(name) is shipped
            if module is own or same:
                setattr(module, name, value)
