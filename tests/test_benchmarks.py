import json
import re
import signal
import subprocess
import sys
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
    providers,
    report,
    runner,
    shapes,
)
from benchmarks.bench_rotary_attention import Case
from benchmarks.timing import DEVICE, DTYPE, check_agreement
from shtx_kernels import reference

# what is multiplied


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
    assert [name for name in shapes.CONFIGS if shapes.foldable(name)] == list("BCDE")


def test_generation_reads_every_weight_it_multiplies_by():
    """Without strides and tables, once a token; of embeddings a row a sequence."""
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
    row = row_of(bench_gpus.bench_gpus, case=case, provider="reference")
    assert (row["gpus"], row["batch"], row["seq_len"]) == (2, 4, 128) and row["ms"] > 0
    assert row["tokens_per_s"] == pytest.approx(4 * 128 / row["ms"] * 1e3)
    assert row["loss"] == pytest.approx(row["reference_loss"], rel=1e-5)
    assert bench_gpus.Case("C", "weak", 2).config_of().batch == 2
    assert case.labels() == {"config": "C", "shape": "strong", "variant": "GPUs: 2"}


@pytest.mark.skipif(bench_gpus.MOST < 2, reason="needs two GPUs, or none")
def test_processes_have_parts_of_the_large_configuration(monkeypatch):
    monkeypatch.setattr(bench_gpus, "STEPS", 1)
    rows = []
    for gpus in (1, 2):
        case = bench_gpus.Case("E", "weak", gpus)
        rows.append(row_of(bench_gpus.bench_gpus, case=case, provider="reference"))
        assert rows[-1]["loss"] == pytest.approx(rows[-1]["reference_loss"], rel=1e-5)
    one, several = (row["flop_per_token"] for row in rows)
    assert several > 3 * one  # 2 layers, and 20
    assert {case.scaling for case in bench_gpus.CASES if case.config == "E"} == {"weak"}


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
    assert row["flops"] == 6 * 64 * 32 * (16 + 32 + 32) and row["ms"] > 0  # of three of four


@pytest.mark.parametrize("provider", ["fused", "fused-without", "reference"])
def test_a_step_with_next_latents(monkeypatch, provider):
    """The fused models by their references, which are not interpreted."""
    in_tiny_configuration(monkeypatch, seq_len=32)
    monkeypatch.setattr(bench_next_latent, "load", lambda provider, reference, config: reference)
    bench = bench_next_latent.bench_next_latent
    row = row_of(bench, config="C", provider=provider, wait_for_turn=lambda: None)
    assert row["ms"] > 0 and row["loss"] == pytest.approx(row["reference_loss"], rel=1e-3)


def test_each_benchmark_has_its_upstream(monkeypatch):
    assert providers.why_not("upstream", "model") is None
    assert "is 0.2.0, the peer is 0.4.0" in providers.why_not("upstream", "next_latent")
    monkeypatch.setattr(providers, "version", lambda name: "0.4.0")
    assert providers.why_not("upstream", "next_latent") is None
    assert "is 0.4.0, the peer is 0.2.0" in providers.why_not("upstream", "model")


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
    """As often as there are tokens, whatever way the op takes."""
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
    """At the rates of the levels: 64 tokens of one, 8 of the other."""
    tiny = dict(num_tokens=9, dim=(4, 16), depth=1, seq_len=32, hierarchies=(1, 8))
    tiny = shapes.Config(2, tiny | dict(hierarchical_stride=(1, 8)))
    monkeypatch.setattr(shapes, "configs", lambda device: {"B": tiny})
    bench = bench_hierarchical_merge.bench_hierarchical_merge
    row = row_of(bench, config="B", provider=provider)
    assert row["flops"] == 3 * 2 * (64 * 4 * 8 + 8 * 16 * 8 + 64 * 8 * 4) and row["ms"] > 0


@pytest.mark.parametrize("window, dilation", [(None, 1), (None, 2), (8, 1), (8, 2)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_peers_of_rotary_attention_agree_with_the_reference(monkeypatch, window, dilation, scale):
    """By plain PyTorch in fp32; FlexAttention has no backward on a CPU."""
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


def test_every_op_has_its_providers():
    benches = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}
    assert benches == {"ceilings", "host", *providers.PROVIDERS}
    everything = bench_rotary_attention.WINDOWED | bench_rotary_attention.FULL
    assert set(providers.PROVIDERS["rotary_attention"]) == everything.keys()
    copied = {"copy", *bench_hierarchical_ar_loss.OPS}
    assert set(providers.PROVIDERS["hierarchical_ar_loss"]) == copied
    for bench in (
        bench_causal_compress,
        bench_feed_forward,
        bench_hierarchical_merge,
        bench_linear,
        bench_linear_cross_entropy,
        bench_next_latent_loss,
        bench_reconstruction_loss,
    ):
        op = bench.__name__.rpartition("bench_")[2]
        assert set(providers.PROVIDERS[op]) == bench.OPS.keys()
    assert set(providers.OPS) == report.SHAPES.keys()


def test_ops_are_chosen():
    chosen = ["ops", "--op", "norm_token_shift", "--provider", "copy", "reference"]
    jobs, impossible = cli.plan(cli.parse(chosen))
    assert [(job.bench, job.provider) for job in jobs] == [
        ("norm_token_shift", "reference"),
        ("norm_token_shift", "copy"),
    ]
    assert not impossible
    jobs, _ = cli.plan(cli.parse(["ops"]))
    assert [*dict.fromkeys(job.bench for job in jobs)] == providers.OPS


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


def test_a_time_limit_ends_as_an_exception_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), cli.exit_at_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_on_a_cpu(tmp_path):
    """With a provider that works, one that fails and one that cannot run here."""
    peer = tmp_path / "peer" / "simple_hierarchical_transformer.py"
    peer.parent.mkdir()
    peer.write_text("raise ImportError('broken\\npeer')")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "model", "--config", "C", "--compile-jobs", "2"]
    command += ["--provider", "upstream", "reference", "fused"]
    command += ["--out", out, "--commit", "cafe"]
    env = child_environment(peer.parent, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # one failed

    results = json.loads((out / "results.json").read_text())
    assert results["small_shapes"] and results["commit"] == "cafe"
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"].keys() >= {"gpu", "driver", "torch", "triton", "cuda", "python"}
    assert results["copy_gb_per_s"] > 0.1 and results["matmul_tflop_per_s"] > 1e-4

    rows = {row["provider"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 3
    assert rows["upstream"]["error"] == "ImportError: broken peer"
    assert "TRITON_INTERPRET=1" in rows["fused"]["error"]
    row = rows["reference"]
    assert row.items() >= {"bench": "model", "config": "C", "commit": "cafe", "batch": 2}.items()
    assert row["ms"] > 0 and row["tokens_per_s"] == pytest.approx(2 * 128 / row["ms"] * 1e3)
    assert row["host_ms"] == pytest.approx(row["ms"], rel=0.9)  # a CPU is its own host
    assert row["caches"] == "cold" and row["first_steps_s"] > row["first_step_s"] > 0
    assert row["loss"] == pytest.approx(row["reference_loss"], rel=1e-5)

    assert "SMALL SHAPES ON A CPU" in done.stdout and report.tables(results) in done.stdout
    assert (out / "model.png").read_bytes()[:4] == b"\x89PNG"


def test_compiling_side_by_side_measures_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.Job, "compiles", True)  # no need to wait for Inductor
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs = [runner.Job("model", (config,), "reference") for config in "BC"]
    rows = [row for _, rows in runner.run(jobs, tmp_path, tmp_path, 200, 2) for row in rows]
    assert sorted(row["config"] for row in rows) == ["B", "C"]
    assert all(row["ms"] > 0 and row["caches"] == "cold, side by side" for row in rows), rows
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["model B reference ...", "model C reference ..."]
    assert sorted(lines[2:]) == ["model B reference compiled", "model C reference compiled"]


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
