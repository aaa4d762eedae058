# bash .dev/go.sh first_call 560 STAMP, on two GPUs: what has to be measured first
B = "python3 -m benchmarks"
C = "--cache /tmp/bcache --commit $STAMP"
JOBS = [("gpus_E", N, 230, f"{B} gpus --config E --out $R/gpus_E {C} --timeout 220")]
JOBS.append(("train", N, 330, f"{B} train --out $R/train {C} --timeout 320", "gpus_E"))
JOBS.append(("gen_A", 1, 110, f"{B} generate --config A --provider fused --out $R/gen_A {C}", "train"))
JOBS.append(("first", 1, 120, "PYTHONPATH=$PYTHONPATH:.dev python3 .dev/first.py A B C D", "train"))
JOBS.append(("nccl", N, 150, "python3 -m pytest tests/test_parallel.py tests/test_fsdp.py -k on_gpus -n 0 -p no:cacheprovider 2>&1 | tail -30", "gen_A first"))
TAILS = {"gpus_E": 1500, "train": 1500, "gen_A": 700, "first": 9000, "nccl": 2500}
