import os, sys, collections, torch, torch.distributed as dist, torch.multiprocessing as mp
from benchmarks import bench_gpus as b, shapes
from benchmarks.providers import build_reference, load
from shtx import TrainStep
from shtx.fsdp import fully_shard_model
def work(rank, n):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", "file:///tmp/e_profile_rdv", world_size=n, rank=rank)
    case = b.Case("E", "weak", n); config = case.config_of()
    model = fully_shard_model(build_reference(config), param_dtype=torch.bfloat16); model.checkpointing = True
    torch.manual_seed(1 + rank)
    ids = torch.randint(1, 256, (config.batch // n, config.model["seq_len"] + 1), device="cuda")
    model = load("fused", model, config)
    step = TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), cuda_graph=False)
    for _ in range(3): step(ids)
    torch.cuda.synchronize(); dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as prof:
        step(ids); torch.cuda.synchronize()
    if rank == 0:
        ks = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        def kind(name):
            for key in ("nccl", "nvjet", "gemm", "cutlass", "flash", "cudnn", "_rotary", "_product_gelu", "_norm_token", "_merge", "chunk_cat", "split_with_sizes", "Memcpy", "Memset", "multi_tensor", "reduce_kernel", "elementwise", "CatArray"):
                if key in name:
                    return name[:60] if key == "nccl" else key
            return name[:48]
        total = collections.Counter(); count = collections.Counter()
        for e in ks: total[kind(e.name)] += e.time_range.elapsed_us(); count[kind(e.name)] += 1
        def union(es):
            t = 0; end = 0
            for s, f in sorted((e.time_range.start, e.time_range.end) for e in es):
                t += max(0, f - max(s, end)); end = max(end, f)
            return t / 1e3
        span = (max(e.time_range.end for e in ks) - min(e.time_range.start for e in ks)) / 1e3
        comm = [e for e in ks if "nccl" in e.name]; rest = [e for e in ks if "nccl" not in e.name]
        print(f"{n} GPUs: span {span:.1f} ms; kernels without NCCL cover {union(rest):.1f}, NCCL {union(comm):.1f}, either {union(ks):.1f}")
        for k, t in total.most_common(30): print(f"  {t/1e3:8.2f} ms {count[k]:6d} x {k}")
    dist.barrier(); dist.destroy_process_group()
if __name__ == "__main__":
    n = int(sys.argv[1]); mp.spawn(work, (n,), n)
