import os
RUNS = os.environ["STUDY"].split()
JOBS = []
def quiet(cmd): return cmd
S = "rm -rf /tmp/st_{i}; mkdir -p /tmp/corp; (cd .study; for f in {c}; do [ -f /tmp/corp/$f.bin ] || (xz -dc $f.bin.xz > /tmp/corp/$f.$$ && mv /tmp/corp/$f.$$ /tmp/corp/$f.bin); done)"
for i, run in enumerate(RUNS):
    corpus = run.split("-")[0]
    JOBS.append((f"st{i}", 1, 900, S.format(i=i, c=corpus) + f"; TRITON_CACHE_DIR=/tmp/tcs python3 -m benchmarks.studies.quality /tmp/corp /tmp/st_{i} --minutes {os.environ.get('MINUTES', '7.8')} --gpus 1 --runs {run} --commit $STAMP; rc=$?; mkdir -p $R/study; cp /tmp/st_{i}/*.json $R/study/; tail -3 /tmp/st_{i}/runs/*/log.txt; cp /tmp/st_{i}/runs/*/log.txt $R/study/log_{i}.txt; exit $rc"))
if os.environ.get("DRAWN"):
    JOBS.insert(0, ("drawn", 0, 560, "mkdir -p /tmp/np; python3 -m pip install -q --no-index --no-deps --target /tmp/np .dev/numpy*.whl; CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 PYTHONPATH=/tmp/np:$PYTHONPATH nice -n 10 python3 -m tests.campaign drawn --jobs 46 --seconds 420 --out $R/drawn.json"))
TAILS = {f"st{i}": 500 for i in range(len(RUNS))} | {"drawn": 5000}
