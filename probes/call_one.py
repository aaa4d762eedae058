# bash .dev/go.sh call_one 560 STAMP
B = "python3 -m benchmarks"
C = "--cache /tmp/bcache --commit $STAMP"
T = "TRITON_CACHE_DIR=/tmp/bcache/triton "
JOBS = [("e_profile", 2, 140, T + "PYTHONPATH=$PYTHONPATH:.dev python3 .dev/e_profile.py 2")]
JOBS += [(f"gen_{x}", 1, 110, f"{B} generate --config {x} --provider fused --out $R/gen_{x} {C}") for x in "ABCD"]
JOBS.append(("model_E", 1, 170, f"{B} model --config E --provider fused floor floor-folded --out $R/model_E {C}"))
JOBS.append(("muon", 1, 260, f"{B} train --provider muon --out $R/muon {C} --timeout 250"))
JOBS.append(("eval", 1, 200, f"{B} train --provider eval --out $R/eval {C} --timeout 190"))
JOBS += [(f"equal_{x}", 1, 300, f"python3 -m benchmarks.equal_training --config {x} --out $R/equal_{x} --commit $STAMP") for x in "BC"]
JOBS.append(("tests", 1, 200, "python3 -m pytest tests/test_decode_ops.py tests/test_decode.py tests/test_generate.py tests/test_generate_graphs.py -n 6 -p no:cacheprovider 2>&1 | tail -15; python3 -m tests.campaign sanitizers --jobs 8 --out $R/san.json"))
TAILS = {"e_profile": 2600, "model_E": 1500, "muon": 700, "eval": 900, "equal_B": 900, "equal_C": 900, "tests": 1500} | {f"gen_{x}": 500 for x in "ABCD"}
