# bash .dev/go.sh second_call 560 STAMP, on two GPUs
B = "python3 -m benchmarks"
C = "--cache /tmp/bcache --commit $STAMP"
JOBS = [("many", 1, 260, "cd .dev/many && PYTHONPATH=$PWD:/tmp/site python3 probes/many.py --seconds 240")]
JOBS.append(("camp", 1, 400, "(python3 -m tests.campaign sanitizers --jobs 4 --out $R/san.json) & (python3 -m tests.campaign fused --jobs 10 --seconds 300 --out $R/fused.json) & wait"))
JOBS += [(f"gen_{x}", 1, 120, f"{B} generate --config {x} --provider fused --out $R/gen_{x} {C}", "many") for x in "BCD"]
JOBS.append(("sums", N, 120, "cd .dev/sums && PYTHONPATH=$PWD:/tmp/site python3 probes/sums.py --seconds 110", "camp gen_B gen_C gen_D"))
TAILS = {"many": 4000, "camp": 3000, "sums": 3000} | {f"gen_{x}": 500 for x in "BCD"}
