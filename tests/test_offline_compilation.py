"""Every kernel compiles for every GPU the project names; that needs none of them."""

import ast
import json
import subprocess
import sys

import pytest
from helpers import ROOT, child_environment

SHARED_LIMIT = {"80": 163, "90": 227, "100": 227, "gfx942": 64}  # KiB a block may have
# Bytes of stack a thread may have, none if not here: as measured with Triton 3.6 and 3.9. Smaller
# tiles spill less and take longer.
STACK_LIMIT = {
    "_attend_kernel": 8,  # fp32, on sm_90
    "_chunk_summary_kernel": 8,  # on sm_100
    "_hierarchical_ar_loss_kernel": 8,
    "_merge_rows_kernel": 152,  # fp32, with Triton 3.9; 120 with 3.6
    "_next_latent_norm_bwd_kernel": 8,  # summaries with a gradient, on sm_80
    "_norm_token_shift_fwd_kernel": 16,  # layer norms that add a branch, on sm_80
    "_norm_token_shift_bwd_kernel": 128,
    "_project_rows_kernel": 8,  # with Triton 3.9; none with 3.6
    "_rotary_attention_fwd_kernel": 72,  # windows of 128
    "_rotary_attention_bwd_tile_kernel": 328,  # with Triton 3.9; 80 with 3.6, on sm_90
    "_rotary_attention_bwd_dkdv_kernel": 480,
    "_rotary_attention_bwd_dq_kernel": 64,
}
WIDE_STACK_LIMIT = {
    "_rotary_attention_fwd_kernel": 256,  # heads of 128; none with 8 warps, which are untimed
    "_rotary_attention_bwd_dkdv_kernel": 72,  # with Triton 3.6; 48 with 3.9
    "_norm_token_shift_bwd_kernel": 24,  # with Triton 3.6; none with 3.9
    "_project_row_kernel": 56,  # with Triton 3.6; none with 3.9
}


def kernels_written() -> set[str]:
    """Names of the jitted kernels in shtx_kernels."""
    files = (ROOT / "shtx_kernels").rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return {name for name in functions if name.endswith("_kernel")}


def compiled(*arguments: str) -> list[dict]:
    """A row for each kernel, of which none may take more than a block or a thread can have."""
    command = [sys.executable, "tests/offline.py", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=child_environment(ROOT), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[arguments[1]] * 1024, row
        assert row.get("LOCAL", 0) == 0, row
    return rows


def spilling(rows: list[dict], limit: dict[str, int]) -> list[dict]:
    """All rows whose stack is larger than their kernel's limit, so that one run names them all."""
    return [row for row in rows if row.get("STACK", 0) > limit.get(row["kernel"], 0)]


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("cuda 80", "bfloat16"),
        ("cuda 90", "bfloat16"),
        ("cuda 90", "float32"),
        ("cuda 100", "bfloat16"),
        ("hip gfx942", "bfloat16"),
    ],
)
def test_compiles(target, dtype):
    rows = compiled(*target.split(), dtype)
    left_out = {"_product_gelu_kernel", "_product_gelu_hopper_kernel"}
    if dtype == "float32":
        left_out |= {"_rotary_attention_fwd_tile_kernel", "_rotary_attention_bwd_tile_kernel"}
    elif target == "cuda 90":
        left_out = set()
    assert {row["kernel"] for row in rows} == kernels_written() - left_out
    assert not spilling(rows, STACK_LIMIT)


def test_compiles_at_widths_of_4096_and_heads_of_128():
    assert not spilling(compiled("cuda", "90", "bfloat16", "wide"), WIDE_STACK_LIMIT)
