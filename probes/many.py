"""Check and time generation of many sequences on one GPU, of main (probes/base) and of this tree.

    python probes/many.py [--profile] [--variants a,b] [--seconds 150]

Prints a line as things end, and a table last. Run from the root of the repository.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START = time.time()
VARIANTS = {  # page: {constant: value}
    "new": {},
    "unfetched": {"decode._many": {"FETCHED": 0}},
    "undivided": {"decode._tiles": {"LAUNCH": 2**40}},
    "thin": {"decode._tiles": {"WIDTHS": [16, 32]}},
    "stages6": {"decode._tiles": {"NARROW": dict(BLOCK_K=64, num_warps=4, num_stages=6)}},
    "deep": {"decode._tiles": {"NARROW": dict(BLOCK_K=128, num_warps=4, num_stages=3)}},
    "warps8": {"decode._tiles": {"NARROW": dict(BLOCK_K=128, num_warps=8, num_stages=3)}},
    "waiting": {},  # without programmatic dependent launches in products of many rows
}
FIRST = ["undivided", "thin", "deep", "warps8", "waiting", "unfetched"]
TARGETS = {"A": 250, "B": 230, "C": 380, "D": 260}


def worker():
    kind, label, jobs, flags = sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), sys.argv[5:]
    import torch

    if label != "base":
        from benchmarks.spaces import set_constants

        for page, values in VARIANTS[label].items():
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            set_constants(page, values)
        if label == "waiting":
            from shtx_kernels.decode import _many, merge  # noqa: F401

            sys.modules["shtx_kernels.decode._many"].ahead = lambda device: dict(AHEAD=False)
            sys.modules["shtx_kernels.decode.merge"].ahead = lambda device: dict(AHEAD=False)
    from benchmarks.shapes import CONFIGS
    from shtx import HierarchicalTransformer
    from shtx.generation.decoder import Decoder
    from shtx.ops import FUSED, REFERENCE
    from shtx_kernels.launch import compile_only

    torch.set_grad_enabled(False)
    bf16 = torch.bfloat16

    def build(name, depth=None):
        torch.manual_seed(0)
        options = CONFIGS[name].model | ({} if depth is None else dict(depth=depth))
        with torch.device("cuda"):
            return HierarchicalTransformer(**options, impl="fused").eval()

    def sampler(decoder, V):
        noise = torch.empty(len(decoder.ids), 16, V, device="cuda").exponential_()
        k = max(1, V // 10)
        return lambda: FUSED.decode.sample(
            decoder.position, decoder.logits, noise, 1.0, k, 1.0, decoder.ids
        )

    def graph_of(function):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph

    def us(graph, decoder, rounds=5, each=20):
        times = []
        for _ in range(rounds):
            decoder.position.fill_(640)
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            for _ in range(each):
                graph.replay()
            b.record()
            torch.cuda.synchronize()
            times.append(a.elapsed_time(b) / each * 1e3)
        return sorted(times)[rounds // 2]

    for name, batches in jobs:
        if kind == "compile":
            model = build(name, 1).to(bf16)
            for batch in batches:
                with compile_only():
                    decoder = Decoder(model, batch, 1152, bf16)
                    decoder.step()
                    sampler(decoder, model.num_tokens)()
            continue
        row = {"label": label, "config": name}
        if "check" in flags:
            model = build(name, 2)
            for p in model.parameters():
                p += 0.02 * torch.randn_like(p)
            batch = 64
            kinds = [(torch.float64, REFERENCE), (bf16, REFERENCE), (bf16, FUSED)]
            decoders = [Decoder(model, batch, 1152, dtype, ops) for dtype, ops in kinds]
            off = [0.0, 0.0]
            start = torch.randint(0, 64, (batch,), device="cuda")
            for d in decoders:
                d.position.copy_(start)
            for _ in range(10):
                ids = torch.randint(0, model.num_tokens, (batch,), device="cuda")
                out = []
                for d in decoders:
                    d.ids.copy_(ids)
                    out.append(d.step().double().clone())
                scale = out[0].abs().max()
                off = [max(o, ((x - out[0]).abs().max() / scale).item()) for o, x in zip(off, out[1:])]
            row |= {"off_reference": off[0], "off": off[1], "right": off[1] <= 2 * off[0] + 1e-3}
            del decoders, model
        model = build(name).to(bf16)
        for batch in batches:
            decoder = Decoder(model, batch, 1152, bf16)
            step = graph_of(decoder.step)
            row[f"step{batch}"] = us(step, decoder)
            sample = sampler(decoder, model.num_tokens)

            def token(decoder=decoder, sample=sample):
                decoder.step()
                sample()

            row[f"token{batch}"] = us(graph_of(token), decoder)
            if "check" in flags:
                outs = []
                decoder.ids.fill_(3)
                for _ in range(20):
                    decoder.position.fill_(640)
                    step.replay()
                    outs.append(decoder.logits.clone())
                row["same_bits"] = row.get("same_bits", True) and all(
                    torch.equal(outs[1], o) for o in outs[2:]
                )
            if "profile" in flags and batch == 64:
                decoder.position.fill_(640)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
                    for _ in range(8):
                        step.replay()
                    torch.cuda.synchronize()
                sums = {}
                for e in p.events():
                    if "CUDA" in str(e.device_type) and "kernel" in e.name:
                        n, t = sums.get(e.name, (0, 0.0))
                        sums[e.name] = n + 1, t + e.time_range.elapsed_us()
                row["profile"] = {k: (n / 8, t / 8) for k, (n, t) in sums.items()}
            del decoder, step, sample
        print("ROW " + json.dumps(row), flush=True)


def call(kind, label, jobs, flags=()):
    paths = [str(ROOT)] if label != "base" else [str(ROOT / "probes/base"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": ":".join(paths)}
    command = [sys.executable, __file__, "worker", kind, label, json.dumps(jobs), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if result.returncode:
        print(f"FAILED {kind} {label} {jobs}: {result.stderr[-1500:]}", flush=True)
    print(f"{time.time() - START:5.0f} s {kind} {label} {jobs}", flush=True)
    return [json.loads(x[4:]) for x in result.stdout.splitlines() if x.startswith("ROW ")]


def main():
    flags = [a[2:] for a in sys.argv[1:] if a in ("--profile",)]
    value = lambda name, default: next(
        (b for a, b in zip(sys.argv, sys.argv[1:]) if a == name), default
    )
    variants = [v for v in value("--variants", ",".join(FIRST)).split(",") if v]
    seconds = float(value("--seconds", 150))
    all_batches = [16, 64, 256]
    compiled = [("new", n, [16, 64]) for n in "ACBD"] + [("base", n, [16, 64]) for n in "ACBD"]
    some = [(v, n, [64]) for v in variants for n in "AC"]
    rows = []
    with ThreadPoolExecutor(8) as pool:
        waits = [pool.submit(call, "compile", v, [(n, b)]) for v, n, b in compiled]
        more = [(v, pool.submit(call, "compile", v, [(n, b)])) for v, n, b in some]
        [w.result() for w in waits]
        [w.result() for _, w in more]  # nothing is timed while others compile
    rows += call("time", "new", [(n, all_batches) for n in "ABCD"], ["check", *flags])
    rows += call("time", "base", [(n, all_batches) for n in "ABCD"], flags)
    for v in variants:
        if time.time() - START < seconds - 12:
            rows += call("time", v, [(n, [64]) for n in "AC"])
        else:
            print(f"no time for {v}")
    for row in rows:
        if "profile" in row:
            print(f"{row['label']} {row['config']} batch 64, kernels of a step:")
            for name, (n, t) in sorted(row["profile"].items(), key=lambda x: -x[1][1]):
                print(f"    {n:5.1f} x {t / n:6.2f} us = {t:7.1f}  {name}")
    columns = [f"{what}{b}" for what in ("step", "token") for b in all_batches]
    print(f"{'us':14s}", *[f"{c:>9s}" for c in columns], "  target (token64)")
    for row in sorted(rows, key=lambda r: r["config"]):
        cells = [f"{row[c]:9.1f}" if c in row else f"{'-':>9s}" for c in columns]
        told = ""
        if "right" in row:
            told = f"right {row['right']} (off {row['off']:.1e}, reference {row['off_reference']:.1e})"
            told += f" same bits {row['same_bits']}"
        print(f"{row['config']} {row['label']:12s}", *cells, f"  {TARGETS[row['config']]}", told)
    print(f"{time.time() - START:.0f} s")


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["worker"] else main()
