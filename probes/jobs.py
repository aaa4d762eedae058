"""python .dev/jobs.py LIST.py SECONDS: run JOBS = [(name, gpus, limit_s, command[, after])] on the GPUs there are."""
import os, runpy, signal, subprocess, sys, time
from pathlib import Path
out = Path(os.environ["OUT"]); seconds = float(sys.argv[2]); t0 = time.monotonic()
import torch
N = torch.cuda.device_count()
ns = runpy.run_path(sys.argv[1], init_globals={"N": N}); jobs = ns["JOBS"]
free = list(range(N)); waiting = list(jobs); running = []; done = {}
now = lambda: time.monotonic() - t0
def log(*a): print(f"[{now():4.0f}]", *a, flush=True)
def end(p):
    try: os.killpg(p.pid, signal.SIGTERM)
    except ProcessLookupError: pass
while (waiting or running) and now() < seconds:
    blocked = False
    for job in list(waiting):
        name, gpus, limit, command, *after = job
        if after and not set(after[0].split()) <= done.keys(): continue
        if gpus and (blocked or gpus > len(free)):
            blocked = True; continue
        waiting.remove(job); mine = [free.pop(0) for _ in range(gpus)]
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))} if gpus else {})
        f = open(out / f"{name}.log", "w")
        p = subprocess.Popen(["bash", "-c", command], env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        running.append((name, p, mine, now(), limit)); log("start", name, mine)
    for r in list(running):
        name, p, mine, began, limit = r
        rc = p.poll()
        if rc is None and now() - began > limit:
            end(p);
            try: rc = p.wait(8)
            except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); rc = p.wait()
            rc = f"cut {rc}"
        if rc is not None:
            try: os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            running.remove(r); free += mine; free.sort(); done[name] = rc; log("end", name, rc, f"{now()-began:.0f} s")
    time.sleep(.2)
for name, p, *_ in running:
    log("cut at end", name); end(p)
time.sleep(4 if running else 0)
for name, p, *_ in running:
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass
print("never begun:", [j[0] for j in waiting])
for name, n in ns.get("TAILS", {}).items():
    path = out / f"{name}.log"
    print(f"--- {name}"); print(path.read_text()[-n:] if path.exists() else "none")
