import json
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, child_environment
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as cli
from benchmarks import (
    bench_causal_compress,
    bench_chunk_summary,
    bench_feed_forward,
    bench_generate,
    bench_gpus,
    bench_hierarchical_ar_loss,
    bench_hierarchical_merge,
    bench_linear,
    bench_linear_cross_entropy,
    bench_model,
    bench_next_latent,
    bench_next_latent_loss,
    bench_norm_token_shift,
    bench_reconstruction_loss,
    bench_rotary_attention,
    bench_scaling,
    bench_train,
    benchmark,
    report,
    runner,
    shapes,
)
from benchmarks import commit as commits
from benchmarks.bench_rotary_attention import Case
from benchmarks.timing import DEVICE, DTYPE, check_agreement
from shtx_kernels import reference

# the products that are counted


@pytest.mark.parametrize("name", shapes.CONFIGS)
def test_products_are_those_that_upstream_runs(name):
    config = shapes.CONFIGS[name]
    ids = torch.empty(config.batch, config.model["seq_len"] + 1, dtype=torch.long, device="meta")
    model = Upstream(**config.model | dict(depth=1)).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(ids, return_loss=True)
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    counted.pop("aten.bmm")  # attention's
    shallow = config._replace(model=config.model | dict(depth=1))
    assert shapes.flops(shapes.products(shallow)) == sum(counted.values())


def test_folding_replaces_the_convolutions_alone():
    config = shapes.CONFIGS["B"]  # embeddings are 1024 wide, convolutions 4096
    direct, folded = shapes.products(config), shapes.products(config, folded=True)
    saved = sum(
        2 * (32 * 1024 // stride - 256) * c * 1024 * 4096 for c, stride in ((2, 1), (4, 1), (16, 8))
    )
    assert shapes.flops(direct) - shapes.flops(folded) == saved
    assert [n for n, config in shapes.CONFIGS.items() if shapes.foldable(config)] == list("BCDE")


def test_the_bound_of_a_step_is_that_of_its_products_and_its_bytes():
    """The numbers are by hand, at 2.4 FLOPs and a byte a ns: bytes bound one level's attention."""
    small = dict(num_tokens=8, dim=(4, 16), depth=2, seq_len=32, heads=1, dim_head=2, ff_mult=1)
    small |= dict(hierarchies=(1, 4), hierarchical_stride=(1, 2), window_sizes=(3, None))
    config = shapes.Config(3, small)  # 96 and 48 rows
    parameters = sum(p.numel() for p in Upstream(**small).parameters())
    seen = 3 * (1 + 2 + 3 + 29 * 4), 3 * 2 * (8 * 9 // 2)  # the second level in two classes
    nanoseconds = {
        "products": 3 * shapes.flops(shapes.products(config, folded=True)) / 2.4,
        "AdamW": 28 * parameters,
        "narrow weights": 2 * parameters,
        "attention": 2 * (12 * 96 * 2 * 2 + 7 * 2 * seen[1] * 2 / 2.4),
        "norms": 2 * 2 * 6 * (96 * 4 + 48 * 16),
        "GELU": 2 * 2 * (2 * 96 * (4 + 2 * 4) - 2 * 96 * 4 * 4 / 2.4),  # the narrow level
        "merge": 2 * 6 * (96 * 4 + 48 * 16),
        "compress": 2 * 2 * 48 * 4 * 16,
        "losses": 2 * (96 * 8 + 48 * 4 * 8) + 6 * 2 * 48 * 16,
    }
    assert 7 * 2 * seen[0] * 2 / 2.4 < 12 * 96 * 2 * 2  # by bytes
    parts = shapes.bound(config, tflop_per_s=0.0024, gb_per_s=1.0)
    assert parts == pytest.approx({part: ns / 1e6 for part, ns in nanoseconds.items()})
    one = shapes.Config(3, dict(num_tokens=300, dim=8, depth=1, seq_len=32, window_sizes=0))
    alone = shapes.bound(one, tflop_per_s=1e9, gb_per_s=1.0)
    assert [alone[part] for part in ("attention", "merge", "compress")] == [0, 0, 0]
    assert alone["norms"] == pytest.approx(6 * 96 * 8 / 1e6)  # before the feed-forward alone


@pytest.mark.parametrize("tokens, window", [(1, None), (7, None), (7, 0), (7, 3), (7, 9)])
def test_pairs_are_those_that_attention_sees(tokens, window):
    sees = lambda i, j: j <= i and (window is None or i - window <= j)
    counted = sum(sees(i, j) for i in range(tokens) for j in range(tokens))
    assert shapes.pairs(tokens, window) == counted


def test_generation_reads_every_weight_it_multiplies_by():
    """A token reads each weight once without strides and tables, and one row of an embedding."""
    config = shapes.CONFIGS["A"]
    unused = ("token_emb", "to_recon", "to_hierarchical_preds")
    weights = [
        p.numel()
        for key, p in shapes.on_meta(config).named_parameters()
        if p.ndim > 1 and not key.startswith(unused) and "to_recon" not in key
    ]
    assert shapes.weight_bytes(config, 1) == 2 * (sum(weights) + 2 * 512)  # and a level's row
    assert shapes.weight_bytes(config, 64) == 2 * (sum(weights) + 64 * 2 * 512)


def test_generation_reads_a_strided_level_every_so_many_tokens_and_rows_of_tables():
    strided = dict(num_tokens=10, dim=(4, 16), depth=2, dim_head=4, heads=1, ff_mult=1)
    strided |= dict(hierarchies=(1, 8), hierarchical_stride=(1, 4))
    block = lambda d: (3 + 1) * 4 * d + 2 * d * d
    merge = 8 * (4 + 16 / 4) + 8 * 4
    read = lambda batch: (
        4 * 10 + batch * 4 + (batch * 8 * 64 + 64 * 16) / 4 + 2 * (block(4) + block(16) / 4 + merge)
    )
    for batch in (1, 64):
        assert shapes.weight_bytes(shapes.Config(1, strided), batch) == 2 * read(batch)


def test_op_shapes_are_the_largest_of_each_width():
    found = shapes.level_shapes(list("ABCD"), "cuda")
    assert [(s.config, s.B, s.M, s.D) for s in found] == [
        ("B", 32, 1024, 128),
        ("B", 32, 1024, 256),
        ("B", 32, 1024, 512),
        ("C", 8, 2048, 1024),
    ]
    assert all(s.config == "A" for s in shapes.level_shapes(["A"], "cuda"))
    wide = shapes.level_shapes(list("ABCDE"), "cuda")[-2:]
    assert [(s.config, s.B, s.M, s.D) for s in wide] == [("E", 2, 8192, 2048), ("E", 2, 2048, 4096)]


def test_the_large_configuration_has_six_billion_parameters():
    count = lambda config: sum(p.numel() for p in shapes.on_meta(config).parameters())
    one = shapes.CONFIGS["E"]
    several = one._replace(model=one.model | {"depth": shapes.SHARDED["E"]})
    assert 2.0e9 < count(one) < 2.2e9 and 5.9e9 < count(several) < 6.2e9


# measuring


def in_tiny_configuration(monkeypatch, seq_len=128):
    tiny = shapes.SMALL["C"].model | dict(dim=16, depth=1, seq_len=seq_len, window_sizes=8)
    monkeypatch.setattr(shapes, "configs", lambda device: {"C": shapes.Config(1, tiny)})


def row_of(bench, **arguments) -> dict:
    pedantic = lambda fn, rounds, warmup_rounds: [fn() for _ in range(rounds + warmup_rounds)]
    benchmark = SimpleNamespace(extra_info={}, pedantic=pedantic)
    bench(benchmark, **arguments)
    return benchmark.extra_info


def train(provider: str) -> dict:
    return row_of(
        bench_model.bench_model, config="C", provider=provider, wait_for_turn=lambda: None
    )


def test_floor_is_products_and_adamw(monkeypatch):
    in_tiny_configuration(monkeypatch)
    row = train("floor")
    assert row["ms"] == pytest.approx(row["gemm_ms"] + row["adamw_ms"])
    assert min(row["gemm_ms"], row["adamw_ms"]) > 0
    assert row["tokens_per_s"] == pytest.approx(128 / row["ms"] * 1e3)
    model = Upstream(**shapes.configs(DEVICE)["C"].model)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_kernels_of_a_step_add_up_to_its_parts():
    kernels = {
        "_rotary_attention_bwd_tile_kernel": 1.0,
        "void pytorch_flash::flash_bwd_kernel<Flash_traits<64, cutlass::bfloat16_t>>": 2.0,
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN": 4.0,
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": 8.0,
        "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>": 16.0,
    }
    parts = bench_model.by_part(kernels)
    assert {part: ms for part, ms in parts.items() if ms} == {
        "attention": 3.0,
        "cuBLAS": 4.0,
        "AdamW": 8.0,
        "others": 16.0,
    }
    ours = {
        name
        for path in (ROOT / "shtx_kernels").glob("**/*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
        if path.parent.name != "decode"
    }
    assert len(ours) > 10
    assert not bench_model.by_part(dict.fromkeys(ours, 1.0))["others"]


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    in_tiny_configuration(monkeypatch)
    load = bench_model.load

    def wrong(*args):
        model = load(*args)
        torch.nn.init.normal_(model.to_logits.weight)
        return model

    row = train("reference")
    assert row["loss"] == pytest.approx(row["reference_loss"], rel=1e-3)
    monkeypatch.setattr(bench_model, "load", wrong)
    with pytest.raises(ValueError, match=r"loss \d+\.\d+ disagrees with the reference's \d\.\d+"):
        train("reference")


def test_fused_is_the_train_step_of_the_library(monkeypatch):
    in_tiny_configuration(monkeypatch)
    monkeypatch.setattr(bench_model, "load", lambda provider, reference, config: reference)
    calls, step = [], bench_model.TrainStep.__call__
    monkeypatch.setattr(
        bench_model.TrainStep, "__call__", lambda self, ids: calls.append(1) or step(self, ids)
    )
    eager = train("fused-eager")
    assert not calls and not eager["cuda_graph"]
    fused = train("fused")
    assert calls and fused["cuda_graph"] == (DEVICE == "cuda")
    assert fused["loss"] == eager["loss"]


def test_scaling_has_a_row_for_each_batch_and_length(monkeypatch):
    in_tiny_configuration(monkeypatch)
    lengths = [case for case in bench_scaling.CASES if case.depth]
    assert len({case.batch * case.seq_len for case in lengths}) == 1 < len(lengths)
    case = bench_scaling.Case("C", 2, 64, depth=2)
    assert case.labels() == {"config": "C, depth 2", "shape": "2 x 64"}
    assert bench_scaling.Case("C", 3).labels() == {"config": "C", "shape": "3 x 128"}
    row = row_of(bench_scaling.bench_scaling, case=case, provider="reference")
    assert (row["batch"], row["seq_len"]) == (2, 64)
    assert row["tokens_per_s"] == pytest.approx(128 / row["ms"] * 1e3)
    assert {job.configs for job in cli.plan(cli.parse(["scaling"]))[0]} == {("B",), ("C",)}


@pytest.mark.skipif(bench_gpus.MOST < 2, reason="needs two GPUs, or none")
def test_processes_share_a_train_step(monkeypatch):
    in_tiny_configuration(monkeypatch)
    case = bench_gpus.Case("C", "strong", 2)
    with pytest.raises(ValueError, match="disagrees"):  # it fails no later case
        row_of(bench_gpus.bench_gpus, case=case._replace(gpus=3), provider="reference")
    row = row_of(bench_gpus.bench_gpus, case=case, provider="reference")
    assert (row["gpus"], row["batch"], row["seq_len"]) == (2, 4, 128) and row["ms"] > 0
    assert row["tokens_per_s"] == pytest.approx(4 * 128 / row["ms"] * 1e3)
    assert row["loss"] == pytest.approx(row["reference_loss"], rel=1e-5)
    phases = ["build", "reference", "first step", "second step", "third step", "steps"]
    assert list(row["seconds"]) == phases and min(row["seconds"].values()) > 0
    assert 1e3 * row["seconds"]["steps"] > row["steps"] / 2 * row["ms"] > 0
    assert bench_gpus.Case("C", "weak", 2).config_of().batch == 2
    assert case.labels() == {"config": "C", "shape": "strong", "variant": "GPUs: 2"}


@pytest.mark.skipif(bench_gpus.MOST < 2, reason="needs two GPUs, or none")
def test_processes_have_parts_of_the_large_configuration():
    rows = []
    for gpus in (1, 2):
        case = bench_gpus.Case("E", "weak", gpus)
        rows.append(row_of(bench_gpus.bench_gpus, case=case, provider="reference"))
        assert rows[-1]["loss"] == pytest.approx(rows[-1]["reference_loss"], rel=1e-5)
    one, several = (row["flop_per_token"] for row in rows)
    assert several > 3 * one  # 2 layers, and 20
    assert {case.scaling for case in bench_gpus.CASES if case.config == "E"} == {"weak"}


def test_long_steps_are_fewer(monkeypatch):
    for name, value in dict(STEPS=30, WARMUP=10, LEAST=8, BUDGET=10.0).items():
        monkeypatch.setattr(bench_gpus, name, value)
    assert bench_gpus.how_many(0.01) == bench_gpus.how_many(0.25) == (30, 10)
    assert bench_gpus.how_many(0.5) == (15, 5)
    assert bench_gpus.how_many(1.0) == (8, 2)  # seven would be within the budget
    assert bench_gpus.how_many(60.0) == (8, 1)


def test_the_command_line_is_measured_by_what_it_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_train, "STEPS", 4)
    case = bench_train.Case(1)
    monkeypatch.setattr(bench_train, "median_ms", lambda benchmark, forward: [forward() or 5.0])
    assert case in bench_train.CASES["adamw"] and case.labels()["config"] == "C"
    adamw = row_of(bench_train.bench_train, case=case, provider="adamw")
    assert adamw["gpus"] == 1 and adamw["tokens_per_s"] > 0
    row = row_of(bench_train.bench_train, case=case, provider="eval")
    tokens = bench_train.WINDOWS * shapes.configs(DEVICE)["C"].model["seq_len"]
    assert row["forward_tokens_per_s"] == pytest.approx(tokens / 5e-3) and row["tokens_per_s"] > 0
    with pytest.raises(RuntimeError, match=r"shtx eval: exit status 1: .*no-run.*"):
        bench_train.call("eval", "--checkpoint", str(tmp_path / "no-run"), "--split", "val")


def test_commands_are_compared_with_one_gpu_and_with_adamw():
    rows = [
        dict(bench="train", config="C", variant=f"GPUs: {gpus}", provider=provider, gpus=gpus)
        | dict(tokens_per_s=rate)
        for gpus, provider, rate in [(1, "adamw", 100.0), (2, "adamw", 190.0), (1, "muon", 95.0)]
    ]
    lines = [bench_train.line(row, rows, {}) for row in rows]
    assert [line["over one GPU (x)"] for line in lines] == ["1.00", "1.90", "1.00"]
    assert [line["over AdamW (x)"] for line in lines] == ["1.00", "1.00", "0.950"]
    row = rows[0] | dict(provider="eval", tokens_per_s=80.0, forward_tokens_per_s=100.0)
    line = bench_train.line(row, [*rows, row], {})
    assert line["of the forward of training (%)"] == "80.0" and line["over AdamW (x)"] == "-"


KILLED = """
import os, signal
from benchmarks.bench_gpus import worker

if __name__ == "__main__":
    worker(0).submit(os.getpid).result()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_of_a_benchmark_that_is_killed_end(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    env = child_environment(ROOT, CUDA_VISIBLE_DEVICES="")
    # those that are left would keep the pipe open
    done = subprocess.run([sys.executable, script], env=env, stdout=subprocess.PIPE, timeout=100)
    assert done.returncode == -signal.SIGKILL


def test_scaling_past_the_memory_is_a_failure_that_keeps_none(monkeypatch):
    in_tiny_configuration(monkeypatch)
    kept = []

    def measure(*args, **keywords):
        large = torch.nn.Linear(1, 1)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(bench_scaling, "measure", measure)
    with pytest.raises(pytest.fail.Exception, match="out of memory: tried to allocate") as error:
        row_of(bench_scaling.bench_scaling, case=bench_scaling.Case("C", 1), provider="reference")
    assert kept[0]() is None and error.value.__context__ is None


def test_generation_is_counted_in_tokens(monkeypatch):
    in_tiny_configuration(monkeypatch, bench_generate.PROMPT + bench_generate.NEW)
    bench = bench_generate
    monkeypatch.setattr(bench, "BATCHES", {"batch 3": 3})
    row = partial(row_of, bench.bench_generate, config="C", variant="batch 3")
    reference = row(provider="reference")
    assert reference["new_tokens"] == bench.FEW[1]
    assert reference["prompt_tokens"] == bench.PROMPT + (bench.NEW - bench.FEW[1]) // 2
    assert reference["tokens_per_s"] == pytest.approx(3e6 / reference["us_per_token"])
    assert reference["weight_bytes"] == shapes.weight_bytes(shapes.configs(DEVICE)["C"], 3)
    assert reference["state_bytes"] > 0 and reference["first_us"] > 0
    assert row(provider="upstream")["us_per_token"] > 0


def test_a_decoder_that_computes_something_else_is_not_timed(monkeypatch):
    in_tiny_configuration(monkeypatch, bench_generate.PROMPT + bench_generate.NEW)
    step = bench_generate.Decoder.step
    monkeypatch.setattr(bench_generate.Decoder, "step", lambda self: step(self) + 1)
    with pytest.raises(ValueError, match="off the reference"):
        row_of(bench_generate.bench_generate, config="C", variant="batch 1", provider="reference")


@pytest.mark.parametrize(
    "variant, forward, backward",
    [("layer, no shift", 2, 3), ("rms, no shift, no branch", 2, 3), ("rms", 4, 4)],
    ids=str,
)
@pytest.mark.parametrize("provider", ["reference", "copy"])
def test_norm_token_shift_is_counted_in_bytes(variant, forward, backward, provider):
    shape = shapes.LevelShape("C", 2, 8, 16, 2)
    bench = bench_norm_token_shift.bench_norm_token_shift
    row = row_of(bench, shape=shape, variant=variant, provider=provider)
    tensor = 2 * 8 * 16 * DTYPE.itemsize
    assert row["forward_bytes"] == forward * tensor and row["backward_bytes"] == backward * tensor
    assert row["forward_ms"] > 0


def test_hierarchical_ar_loss_is_timed_whole_and_its_kernel_in_bytes():
    bench = bench_hierarchical_ar_loss
    run = partial(
        row_of, bench.bench_hierarchical_ar_loss, shape=shapes.LevelShape("C", 2, 8, 16, 2)
    )
    row = run(variant=bench.ALL, provider="reference")
    assert row["forward_ms"] > 0 and "forward_bytes" not in row
    for provider in ("fused", "copy"):
        row = run(variant=bench.KERNEL, provider=provider)
        tensor = 2 * 8 * 16 * DTYPE.itemsize
        assert row["forward_bytes"] == 2 * tensor and row["backward_bytes"] == 4 * tensor
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0


@pytest.mark.parametrize("provider", ["fused", "reference", "cublas"])
def test_next_latent_loss_is_counted_in_products(provider):
    bench = bench_next_latent_loss.bench_next_latent_loss
    row = row_of(bench, shape=shapes.LevelShape("C", 2, 8, 16, 2), provider=provider)
    assert row["flops"] == 6 * 2 * 7 * (32 + 16 + 16) * 16 and row["ms"] > 0


@pytest.mark.parametrize("provider", ["fused", "reference"])
def test_chunk_summary_of_levels_of_other_widths(monkeypatch, provider):
    tiny = shapes.SMALL["B"].model | dict(seq_len=32)
    monkeypatch.setattr(shapes, "configs", lambda device: {"B": shapes.Config(1, tiny)})
    row = row_of(bench_chunk_summary.bench_chunk_summary, config="B", provider=provider)
    assert row["flops"] == 6 * 64 * 32 * (16 + 32 + 32) and row["ms"] > 0  # three levels of four


@pytest.mark.parametrize("provider", ["fused", "fused-without", "reference"])
def test_a_step_with_next_latents(monkeypatch, provider):
    """The fused models by their references, which are not interpreted."""
    in_tiny_configuration(monkeypatch, seq_len=32)
    monkeypatch.setattr(bench_next_latent, "load", lambda provider, reference, config: reference)
    bench = bench_next_latent.bench_next_latent
    row = row_of(bench, config="C", provider=provider, wait_for_turn=lambda: None)
    assert row["ms"] > 0 and row["loss"] == pytest.approx(row["reference_loss"], rel=1e-3)


def test_each_benchmark_has_its_upstream(monkeypatch):
    model, next_latent = (benchmark.benchmarks()[name] for name in ("model", "next_latent"))
    assert model.why_not("upstream") is None
    assert "is 0.2.0, the peer is 0.4.0" in next_latent.why_not("upstream")
    monkeypatch.setattr(benchmark, "version", lambda name: "0.4.0")
    assert next_latent.why_not("upstream") is None
    assert "is 0.4.0, the peer is 0.2.0" in model.why_not("upstream")


@pytest.mark.parametrize("provider", ["flex", "liger", "fused", "upstream", "reference"])
def test_what_a_provider_needs_is_said(provider, monkeypatch):
    """A GPU, a package, the interpreter, upstream, nothing."""
    peers = {"flex": None, "liger": "no_such_package"}
    bench = benchmark.Benchmark(
        ("flex", "liger", "fused", "upstream", "reference"), (), peers=peers
    )
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    assert bench.by_default() == ["upstream", "reference"]
    on_a_cpu = bench.why_not(provider)
    assert (on_a_cpu == "needs a CUDA device") == (provider in peers)
    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    monkeypatch.setattr(benchmark, "why_not_fused", lambda device: f"not on {device}")
    assert bench.by_default() == list(bench.providers)
    reasons = {"liger": "no-such-package is not installed", "fused": "not on cuda"}
    assert bench.why_not(provider) == reasons.get(provider)


@pytest.mark.parametrize("provider", ["reference", "local-mha"])
def test_rotary_attention_is_counted_in_bytes(provider):
    case = Case(2, 32, 2, 16, window=8, dilation=2)
    row = row_of(bench_rotary_attention.bench_rotary_attention, case=case, provider=provider)
    tensor, lse = 2 * 32 * 2 * 16 * DTYPE.itemsize, 2 * 32 * 2 * 4
    assert row["forward_bytes"] == 4 * tensor + lse
    assert row["backward_bytes"] == 8 * tensor + 2 * lse
    assert row["forward_ms"] > 0


@pytest.mark.parametrize("provider", ["reference", "cublas"])
@pytest.mark.parametrize("bench", [bench_linear_cross_entropy, bench_reconstruction_loss])
def test_losses_are_counted_in_flops(bench, provider):
    (run,) = (fn for name, fn in vars(bench).items() if name.startswith("bench_"))
    row = row_of(run, case=bench.Case(64, 16, 50, 1), provider=provider)
    assert row["flops"] == 3 * 2 * 64 * 16 * 50 and row["ms"] > 0


@pytest.mark.parametrize("provider", ["fused", "products", "reference", "cublas"])
def test_causal_compress_is_counted_in_flops(provider):
    """Every token counts, whatever way the op takes."""
    case = bench_causal_compress.Case(1, 10, 3, 4, 5, C=4, stride=2)
    bench = bench_causal_compress.bench_causal_compress
    row = row_of(bench, case=case, provider=provider)
    assert row["flops"] == 3 * 2 * 5 * (4 * 4 * 16 + 16 * 5) and row["ms"] > 0


@pytest.mark.parametrize("provider", ["fused", "reference", "cublas"])
def test_feed_forward_is_counted_in_flops(provider):
    shape = shapes.LevelShape("C", 2, 8, 16, 1)
    row = row_of(bench_feed_forward.bench_feed_forward, shape=shape, provider=provider)
    assert row["flops"] == 3 * 2 * 2 * (16 * 16 * 64) and row["ms"] > 0


@pytest.mark.parametrize("provider", ["fused", "reference", "cublas"])
def test_linear_is_counted_in_flops(provider):
    shape = shapes.LevelShape("C", 2, 8, 16, 1)
    row = row_of(bench_linear.bench_linear, shape=shape, provider=provider)
    assert row["flops"] == 3 * 2 * (16 * 16 * 48) and row["ms"] > 0


@pytest.mark.parametrize("provider", ["reference", "cublas"])
def test_hierarchical_merge_is_counted_in_flops(provider, monkeypatch):
    """Each level counts its own tokens: 64 of one, 8 of the other."""
    tiny = dict(num_tokens=9, dim=(4, 16), depth=1, seq_len=32, hierarchies=(1, 8))
    tiny = shapes.Config(2, tiny | dict(hierarchical_stride=(1, 8)))
    monkeypatch.setattr(shapes, "configs", lambda device: {"B": tiny})
    bench = bench_hierarchical_merge.bench_hierarchical_merge
    row = row_of(bench, config="B", provider=provider)
    assert row["flops"] == 3 * 2 * (64 * 4 * 8 + 8 * 16 * 8 + 64 * 8 * 4) and row["ms"] > 0


@pytest.mark.parametrize("window, dilation", [(None, 1), (None, 2), (8, 1), (8, 2)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_peers_of_rotary_attention_agree_with_the_reference(monkeypatch, window, dilation, scale):
    """They run as plain PyTorch in fp32; FlexAttention has no backward on a CPU."""
    peers = bench_rotary_attention
    monkeypatch.setattr(peers, "autocast", nullcontext)
    cpu = {"flex": peers.OPS["flex"], "local-mha": peers.local_mha}
    if window is None:
        cpu["local-mha"] = peers.around(partial(peers.sdpa, backend=peers.SDPBackend.MATH))
    qkv = torch.randn(2, 32, 3 * 2 * 16, device=DEVICE, requires_grad=True)
    keywords = dict(window=window, dilation=dilation, xpos=window is None, scale=scale)
    expected = reference.rotary_attention(qkv, 2, **keywords)
    dout = torch.randn_like(expected)
    with torch.compiler.set_stance("force_eager"):
        for name, op in cpu.items():
            if name == "flex":
                check_agreement([op(qkv.detach(), 2, **keywords)], [expected], 1e-5)
                continue
            out = op(qkv, 2, **keywords)
            gradients = [torch.autograd.grad(t, qkv, dout)[0] for t in (out, expected)]
            check_agreement([out, gradients[0]], [expected, gradients[1]], 1e-5)


def test_flash_attention_with_a_window_has_a_gradient():
    qkv = torch.empty(2, 32, 3 * 2 * 16, dtype=torch.float16, device="meta", requires_grad=True)
    with torch.compiler.set_stance("force_eager"):
        out = bench_rotary_attention.WINDOWED["flash-window"](qkv, 2, window=8, dilation=2)
    assert out.shape == (2, 32, 32) and out.dtype == torch.float16
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("window, provider", [(8, "sdpa-flash"), (None, "local-mha")])
def test_a_peer_without_such_attention_is_left_out(window, provider):
    with pytest.raises(pytest.skip.Exception):
        row_of(
            bench_rotary_attention.bench_rotary_attention,
            case=Case(2, 32, 2, 16, window),
            provider=provider,
        )


def test_every_benchmark_but_two_has_a_table():
    benches = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}
    assert benches == {"ceilings", "host", *benchmark.benchmarks()}
    assert all(each.tables and each.providers for each in benchmark.benchmarks().values())


def test_ops_are_chosen():
    chosen = ["ops", "--op", "norm_token_shift", "--provider", "copy", "reference"]
    jobs, impossible = cli.plan(cli.parse(chosen))
    assert [(job.bench, job.provider) for job in jobs] == [
        ("norm_token_shift", "reference"),
        ("norm_token_shift", "copy"),
    ]
    assert not impossible
    jobs, _ = cli.plan(cli.parse(["ops"]))
    assert [*dict.fromkeys(job.bench for job in jobs)] == benchmark.ops()


def test_agreement_is_relative_to_the_norm():
    reference = [torch.ones(4), torch.tensor([3.0, 4.0])]
    check_agreement([torch.ones(4), torch.tensor([3.0, 4.04])], reference, bound=1e-2)
    with pytest.raises(ValueError, match=r"gradient 1 is 2\.0e-02 off the reference, bound 1e-02"):
        check_agreement([torch.ones(4), torch.tensor([3.0, 4.1])], reference, bound=1e-2)
    with pytest.raises(ValueError, match="output or gradient 0 is nan off"):
        check_agreement([torch.full((4,), torch.nan), reference[1]], reference, bound=1e-2)


def test_a_process_that_ends_early_is_a_row(tmp_path):
    [(job, [row])] = runner.run([runner.Job("model", ("A",), "fused")], tmp_path, tmp_path, 0.2)
    assert row == {
        "bench": "model",
        "config": "A",
        "provider": "fused",
        "error": "exit status -9: no result within 0 s",
    }


SLOW = """
import time

import pytest


@pytest.mark.parametrize("variant", ["first", "second"])
def bench_slow(benchmark, provider, variant):
    print(variant, "goes on", flush=True)
    if variant == "second":
        time.sleep(600)
    benchmark.extra_info["ms"] = 7.0
"""


@pytest.fixture
def slow_benchmark(tmp_path, monkeypatch):
    """The job of a benchmark whose second case does not end."""
    folder = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", folder, ignore=shutil.ignore_patterns("results"))
    (folder / "bench_slow.py").write_text(SLOW)
    monkeypatch.setattr(runner, "HERE", folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return runner.Job("slow", provider="reference")


def wait_for_second_case(folder):
    while "second goes on" not in (folder / "slow-reference.log").read_text():
        time.sleep(0.1)


def test_rows_come_as_they_are_measured(slow_benchmark, tmp_path, capsys):
    running = runner.run([slow_benchmark], tmp_path, tmp_path, 200)
    job, [row] = next(running)
    assert job == slow_benchmark
    assert row == dict(bench="slow", provider="reference", variant="first", ms=7.0)
    wait_for_second_case(tmp_path)
    running.close()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "slow reference was ended after: second goes on"
    ]


def test_a_case_past_the_time_costs_no_other_its_row(slow_benchmark, tmp_path):
    process = runner.Process(slow_benchmark, tmp_path, tmp_path, 200)
    wait_for_second_case(tmp_path)
    process.deadline = time.monotonic()
    [row, failed] = [row for rows in process.finish() for row in rows]
    assert row["ms"] == 7.0
    assert failed["error"] == (
        "exit status -9: no result within 200 s, the last line was: second goes on"
    )


def test_a_line_says_what_was_measured_and_where_the_time_went():
    row = dict(shape="weak", variant="GPUs: 2", ms=812.5, seconds=dict(build=1.26, steps=9.0))
    assert cli.summary([row]) == "weak, GPUs: 2, 812.500 ms (build 1.3 s, steps 9.0 s)"
    assert cli.summary([row, dict(ms=1.0)]) == "812.500 ms; 1.000 ms"
    assert cli.summary([dict(variant="GPUs: 4", error="no memory")]) == "GPUs: 4, no memory"
    assert cli.summary([]) == "0 rows" and cli.summary([{}]) == "1 row"


def test_a_time_limit_ends_as_an_exception_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), cli.exit_at_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


PLANTED = """
from benchmarks.benchmark import Benchmark, Table

line = lambda row, rows, results: {"provider": row["provider"], "wheat (t)": str(row["wheat"])}
BENCHMARK = Benchmark(("reference",), (Table("What was planted", line),))


def bench_planted(benchmark, provider):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["wheat"] = 7
"""


def test_the_command_on_a_cpu(tmp_path):
    """One provider works, one fails and one cannot run here.

    The tree is a copy without git, with one file more, which is a benchmark.
    """
    for folder in commits.FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    (tmp_path / "benchmarks" / "bench_planted.py").write_text(PLANTED)
    peer = tmp_path / "peer" / "simple_hierarchical_transformer.py"
    peer.parent.mkdir()
    peer.write_text("raise ImportError('broken\\npeer')")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "model", "ops"]
    command += ["--config", "C", "--compile-jobs", "2", "--op", "planted"]
    command += ["--provider", "upstream", "reference", "fused"]
    command += ["--out", out, "--commit", f"0123456789-{commits.digest(tmp_path)}"]
    env = child_environment(peer.parent, tmp_path, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # one failed

    results = json.loads((out / "results.json").read_text())
    assert results["small_shapes"] and results["commit"] == "0123456789"
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"].keys() >= {"gpu", "driver", "torch", "triton", "cuda", "python"}
    assert results["copy_gb_per_s"] > 0.1 and results["matmul_tflop_per_s"] > 1e-4

    planted = results["rows"].pop()
    assert planted["bench"] == "planted" and planted["wheat"] == 7
    rows = {row["provider"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 3
    assert rows["upstream"]["error"] == "ImportError: broken peer"
    assert "TRITON_INTERPRET=1" in rows["fused"]["error"]
    row = rows["reference"]
    assert (
        row.items() >= {"bench": "model", "config": "C", "commit": "0123456789", "batch": 2}.items()
    )
    assert row["ms"] > 0 and row["tokens_per_s"] == pytest.approx(2 * 128 / row["ms"] * 1e3)
    assert row["host_ms"] == pytest.approx(row["ms"], rel=0.9)  # a CPU is its own host
    assert row["caches"] == "cold" and row["first_steps_s"] > row["first_step_s"] > 0
    assert row["loss"] == pytest.approx(row["reference_loss"], rel=1e-5)

    assert "SMALL SHAPES ON A CPU" in done.stdout and report.tables(results) in done.stdout
    assert "| provider  | wheat (t) |" in done.stdout and "| reference |         7 |" in done.stdout
    assert (out / "model.png").read_bytes()[:4] == b"\x89PNG"


def test_compiling_side_by_side_measures_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs = [runner.Job("model", (config,), "reference", compiles=True) for config in "BC"]
    rows = [row for _, rows in runner.run(jobs, tmp_path, tmp_path, 200, 2) for row in rows]
    assert sorted(row["config"] for row in rows) == ["B", "C"]
    assert all(row["ms"] > 0 and row["caches"] == "cold, side by side" for row in rows), rows
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["model B reference ...", "model C reference ..."]
    assert sorted(lines[2:]) == ["model B reference compiled", "model C reference compiled"]


@pytest.fixture
def tree(tmp_path):
    """A tree in git, with a function that runs git there."""
    (tmp_path / "shtx").mkdir()
    (tmp_path / "shtx" / "model.py").write_text("depth = 1\n")
    person = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    git = lambda *args: subprocess.run(
        ["git", "-C", tmp_path, *person, *args], check=True, capture_output=True
    )
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    return tmp_path, git


def test_results_name_the_commit_that_git_has(tree):
    root, git = tree
    first = commits.resolve(None, root)
    assert re.fullmatch("[0-9a-f]{10}", first) and commits.stamp(root).startswith(f"{first}-")
    (root / "results.json").write_text("{}")
    assert commits.resolve(None, root) == first  # which runs nothing
    for file, text in (("model.py", "depth = 2\n"), ("more.py", "")):
        (root / "shtx" / file).write_text(text)
        for ask in (commits.stamp, partial(commits.resolve, None)):
            with pytest.raises(SystemExit, match=rf"commit first, .*shtx/{file}"):
                ask(root)
        git("add", ".")
        git("commit", "--message", "next")
    assert commits.resolve(None, root) != first
    stamp = commits.stamp(root)
    git("reset", "--soft", "HEAD~1")  # as in a copy whose git has an earlier commit
    assert commits.resolve(stamp, root) == stamp[:10]


def test_a_copy_of_the_tree_needs_a_stamp_of_its_files(tree):
    root, _ = tree
    stamp = commits.stamp(root)
    shutil.rmtree(root / ".git")
    assert commits.resolve(None, root) == "unknown"
    assert commits.resolve(stamp, root) == stamp[:10]
    for text in ("cafe", stamp[:10], stamp.upper(), f"{stamp} "):
        with pytest.raises(SystemExit, match="--commit: .* is not what `python -m benchmarks comm"):
            commits.resolve(text, root)
    (root / "shtx" / "model.py").write_text("depth = 2\n")
    with pytest.raises(SystemExit, match=f"--commit: the files here are not those of {stamp}"):
        commits.resolve(stamp, root)
    with pytest.raises(SystemExit, match="git has no commit of "):
        commits.stamp(root)


def test_the_git_of_a_folder_around_the_tree_is_not_its_git(tree):
    root, _ = tree
    assert commits.head(root / "shtx") is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "KIND: 'trian' is unknown, choose from ops model next_latent"),
        (["ops", "--op", "x"], "--op: 'x' is unknown, choose from causal_compress chunk_summary"),
        (["ops", "--op", "rotary_attention", "--provider", "copy"], "--provider: 'copy' is unk"),
        (["model", "--config", "F"], "--config: 'F' is unknown, choose from A B C D E"),
        (["generate", "--provider", "floor"], "--provider: 'floor' is unknown, choose from fused"),
        (["model", "--config", "A", "--provider", "floor-folded"], "--provider: floor-folded does"),
        (["scaling", "--config", "A"], "--provider: none does not apply to this KIND and --config"),
        (["model", "--config", "C", "--out", __file__], f"--out: {__file__}: "),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, message):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# reporting
