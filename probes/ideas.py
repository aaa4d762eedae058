"""python .dev/ideas.py attention|blas|products|adamw|fp8: ideas of the step, each with its measurement."""
import itertools, json, os, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from statistics import median
from benchmarks import shapes
bf = torch.bfloat16
torch.manual_seed(0)
T0 = time.time()
def say(*a): print(f"[{time.time()-T0:4.0f}]", *a, flush=True)

def gt(f, n=4, rounds=7):
    s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(2): f()
    torch.cuda.current_stream().wait_stream(s); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(n): f()
    out = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); g.replay(); b.record(); torch.cuda.synchronize()
        out.append(a.elapsed_time(b) / (2 * n) * 1e3)
    return median(out)

def attention():
    from shtx_kernels.rotary_attention import library, tiles
    import importlib; ra = importlib.import_module("shtx_kernels.rotary_attention")
    cases = {"D": (1, 16384, 8, 64, 16), "A": (4, 2048, 8, 64, 8), "n2048": (16, 2048, 8, 64, 1), "n1024": (32, 1024, 8, 64, 1), "n512": (64, 512, 8, 64, 1)}
    takes = library.takes
    for name, (B, M, H, E, dil) in cases.items():
        qkv = torch.randn(B, M, 3 * H * E, device="cuda", dtype=bf)
        dout = torch.randn(B, M, H * E, device="cuda", dtype=bf)
        table = ra.make_table(qkv, E, M // dil)
        for xpos in (True,):
            opts = (H, -1, dil, xpos, False, E ** -0.5)
            def fwd(): return ra._rotary_attention_fwd(qkv, table, *opts)
            library.takes = takes
            ra.library.takes = takes
            out, lse, rot = fwd()
            def bwd_l(): return ra._rotary_attention_bwd(rot[0], table, out, lse, dout, *opts)
            ref = bwd_l()
            say(name, f"library: forward {gt(fwd):.1f} us, backward {gt(bwd_l):.1f}")
            ra.library.takes = lambda *a: False
            for bm, bn, w, st in ((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 4, 2), (128, 128, 8, 2)):
                tiles.forward = lambda *a, c=dict(BLOCK_M=bm, BLOCK_N=bn, num_warps=w, num_stages=st): c
                try:
                    o2, l2, _ = fwd(); e = ((o2 - out).float().norm() / out.float().norm()).item()
                    say(name, f"  own forward {bm, bn, w, st}: {gt(fwd):.1f} us, off {e:.1e}")
                except Exception as x: say(name, "  own forward", bm, bn, w, st, str(x)[-80:])
            tiles.forward = lambda *a: dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
            o2, l2, _ = fwd()
            strides = *qkv.stride()[:2], *dout.stride()[:2]
            n = M // dil
            dqkv = torch.empty_like(qkv)
            sizes = dict(precision=ra.matmul_precision())
            for which, kernel, size in (("dkdv", ra._rotary_attention_bwd_dkdv_kernel, "BLOCK_N"), ("dq", ra._rotary_attention_bwd_dq_kernel, "BLOCK_M")):
                for bm, bn, w, st in ((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 1), (64, 128, 8, 2), (128, 64, 8, 1), (128, 64, 8, 2), (32, 128, 4, 2), (128, 32, 4, 2), (32, 64, 4, 3), (64, 32, 4, 3), (128, 128, 8, 1)):
                    cfg = dict(BLOCK_M=bm, BLOCK_N=bn, num_warps=w, num_stages=st)
                    count = -(-n // cfg[size])
                    k = ra._kernel_of(kernel, bf, H, E, -1, dil, xpos, False, ra.matmul_precision(), **cfg)
                    def run(): k((B * H * dil * count,), (qkv, table, o2, l2, dout, dqkv), *strides, M, n, count, E ** -0.5 * ra.LOG2_E)
                    try:
                        run(); part = slice(0, H * E) if which == "dq" else slice(H * E, 3 * H * E)
                        e = ((dqkv - ref)[..., part].float().norm() / ref[..., part].float().norm()).item()
                        say(name, f"  own {which} {bm, bn, w, st}: {gt(run):.1f} us, off {e:.1e}")
                    except Exception as x: say(name, "  own", which, bm, bn, w, st, str(x)[-80:])
    library.takes = takes

def build(name, fp8=False):
    from shtx import HierarchicalTransformer, TrainStep
    c = shapes.CONFIGS[name]; torch.manual_seed(0)
    with torch.device("cuda"): model = HierarchicalTransformer(**c.model)
    if fp8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("rowwise") if fp8 == "rowwise" else Float8LinearConfig(), module_filter_fn=lambda m, n: n.startswith("layers") and m.in_features % 16 == 0 and m.out_features % 16 == 0)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = TrainStep(model, opt)
    ids = torch.randint(c.model["num_tokens"], (c.batch, c.model["seq_len"] + 1), device="cuda")
    return step, ids

def step_ms(step, ids, n=12, rounds=5):
    for _ in range(4): step(ids)
    out = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(n): step(ids)
        b.record(); torch.cuda.synchronize(); out.append(a.elapsed_time(b) / n)
    return median(out)

def blas():
    for name in "ABCD":
        for lib in ("default", "cublaslt", "cublas", "default"):
            torch.backends.cuda.preferred_blas_library(lib)
            step, ids = build(name); ms = step_ms(step, ids)
            say(name, lib, f"{ms:.3f} ms"); step.close(); del step; torch.cuda.empty_cache()

def fp8():
    for name in "CAEBD":
        for kind in (False, "rowwise", "tensorwise"):
            if name == "E" and torch.cuda.mem_get_info()[1] < 100e9: continue
            try:
                step, ids = build(name, kind); ms = step_ms(step, ids, 6, 3)
                say(name, kind, f"{ms:.3f} ms, loss {step(ids)[0].item():.3f}"); step.close(); del step
            except Exception as x: say(name, kind, type(x).__name__, str(x)[-300:])
            torch.cuda.empty_cache()
    # products alone: what fp8 could save where all operands were there in fp8
    for M, K, N in ((16384, 1024, 4096), (16384, 4096, 1024), (16384, 1024, 1536), (16384, 512, 1024), (16384, 2048, 8192), (4096, 4096, 16384)):
        x = torch.randn(M, K, device="cuda", dtype=bf); w = torch.randn(N, K, device="cuda", dtype=bf)
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        sx, sw = torch.ones(M, 1, device="cuda"), torch.ones(1, N, device="cuda")
        b = gt(lambda: x @ w.T); f = gt(lambda: torch._scaled_mm(x8, w8.T, sx, sw, out_dtype=bf)); one = torch.ones((), device="cuda")
        t = gt(lambda: torch._scaled_mm(x8, w8.T, one, one, out_dtype=bf))
        say("product", M, K, N, f"bf16 {b:.1f} us, fp8 rowwise {f:.1f}, tensorwise {t:.1f}")

def products():
    sys.path.insert(0, ".dev")
    import gluon_product as ws
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    SM = torch.cuda.get_device_properties(0).multi_processor_count
    desc = lambda t, b: TensorDescriptor(t, list(t.shape), list(t.stride()), b, gl.NVMMASharedLayout.get_default_for(b, gl.bfloat16))
    cfgs = [(128, 128, 64, 4, 2, 4, 168, 240, 128), (128, 128, 64, 5, 2, 4, 168, 240, 64), (128, 256, 64, 3, 1, 8, 168, 24, 128), (128, 256, 64, 4, 1, 8, 168, 24, 128)]
    for name in "ABCD":
        c = shapes.CONFIGS[name]; total = [0.0, 0.0, 0.0]
        for p in shapes.products(c, shapes.foldable(c)):
            x = torch.randn(p.rows, p.inner, device="cuda", dtype=bf); w = torch.randn(p.columns, p.inner, device="cuda", dtype=bf)
            u = torch.empty(p.rows, p.columns, device="cuda", dtype=bf); a = torch.empty_like(u)
            lib = gt(lambda: torch.mm(x, w.T, out=u)); torch.backends.cuda.preferred_blas_library("cublaslt"); lt = gt(lambda: torch.mm(x, w.T, out=u)); torch.backends.cuda.preferred_blas_library("default")
            best, which = float("inf"), None
            if p.inner % 64 == 0 and p.columns % 128 == 0:
                for cfg in cfgs:
                    BM, BN, BK, ST, G, warps, maxnreg, regs, half = cfg
                    if p.columns % BN: continue
                    grid = min(SM, -(-p.rows // BM) * -(-p.columns // BN))
                    def run(): ws.product_gelu[(grid,)](desc(x, [BM, BK]), desc(w, [BN, BK]), desc(u, [BM, half]), desc(a, [BM, half]), p.rows, p.columns, p.inner, ST, G, 0, regs, num_warps=warps, maxnreg=maxnreg)
                    try:
                        t = gt(run)
                        if t < best: best, which = t, cfg[:4]
                    except Exception as e: say("FAILED", cfg, str(e)[-100:])
            total[0] += lib * p.times; total[1] += min(lib, lt) * p.times; total[2] += min(lib, best) * p.times
            say(name, p, f"cuBLAS {lib:.1f} us, cublasLt {lt:.1f}, Gluon {best:.1f} {which}")
        say(f"{name} forward products: {total[0]/1e3:.2f} ms; with cublasLt where faster {total[1]/1e3:.2f}; with Gluon where faster {total[2]/1e3:.2f}")

import triton, triton.language as tl
@triton.jit
def kernel(p, g, m, v, h, lr, b1, b2, eps, wd, c1, c2, n, NARROW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK); k = i < n
    P, G, M_, V = tl.load(p + i, k), tl.load(g + i, k), tl.load(m + i, k), tl.load(v + i, k)
    P = P * (1 - lr * wd); M_ = b1 * M_ + (1 - b1) * G; V = b2 * V + (1 - b2) * G * G
    P = P - lr / c1 * M_ / (tl.sqrt(V / c2) + eps)
    tl.store(p + i, P, k); tl.store(m + i, M_, k); tl.store(v + i, V, k)
    if NARROW: tl.store(h + i, P.to(tl.bfloat16), k)

def adamw():
    for name in "ABCD":
        ps = [torch.nn.Parameter(p.new_empty(p.shape, device="cuda").normal_()) for p in shapes.on_meta(shapes.CONFIGS[name]).parameters()]
        for p in ps: p.grad = torch.randn_like(p)
        opt = torch.optim.AdamW(ps, lr=1e-4, fused=True, capturable=True); opt.step()
        wide = [p for p in ps if p.ndim >= 2]; hs = [p.detach().to(bf) for p in wide]
        t_opt = gt(opt.step); t_cast = gt(lambda: torch._foreach_copy_(hs, [p.detach() for p in wide]))
        n = sum(p.numel() for p in ps); P, G, M_, V = (torch.rand(n, device="cuda") for _ in range(4)); H = torch.empty(n, device="cuda", dtype=bf)
        best = {}
        for narrow in (False, True):
            best[narrow] = min(gt(lambda: kernel[(triton.cdiv(n, B),)](P, G, M_, V, H, 1e-4, .9, .999, 1e-8, .01, .1, .001, n, narrow, B, num_warps=w)) for B, w in ((1024, 4), (2048, 8), (2048, 4)))
        say(name, f"n {n/1e6:.0f}M: torch fused AdamW {t_opt:.0f} us, casts (foreach_copy) {t_cast:.0f}, one flat Triton AdamW {best[False]:.0f}, with narrow copy {best[True]:.0f}")
        del ps, opt, hs, P, G, M_, V, H; torch.cuda.empty_cache()

for name in sys.argv[1:]:
    try: globals()[name]()
    except Exception:
        import traceback; traceback.print_exc()
