"""Generation in bf16, from a prompt: 1024 tokens, or a few in the middle of them where each takes
milliseconds.

`fused` replays a CUDA graph for every token; `reference` is the same decoder in eager PyTorch;
`upstream` runs its whole model, under autocast. The first token, of a call for it alone, waits for
the weights to be copied and the prompt to be read; the time of the others is that of a longer call
less it, and has a rebuild in it where the two are more than the model's seq_len.

All of it is of the third call and later ones, as a server makes them: in the first, kernels are
compiled and all that is not a step runs eagerly; in the second, it is captured.
"""

from functools import partial

import pytest
import torch

from benchmarks import shapes
from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import find, number, ratio
from benchmarks.charts import bars
from benchmarks.providers import build_reference, load
from benchmarks.timing import DEVICE, DTYPE, autocast, check_agreement, median_ms
from shtx.generation.decoder import Decoder

PROMPT, NEW = (128, 1024) if DEVICE == "cuda" else (16, 8)
FEW = (32, 4) if DEVICE == "cuda" else (4, 4)  # rounds of one sequence, and of several
WARMUPS = 2  # calls: one runs eagerly, one captures
STEPS = 8  # the logits of the last one are compared
BATCHES = {"batch 1": 1, "batch 64": 64}


def line(row: dict, rows: list[dict], results: dict) -> dict:
    us, first, state = (row.get(name) for name in ("us_per_token", "first_us", "state_bytes"))
    upstream = find(rows, row, "upstream").get("us_per_token")
    floor = ratio(row.get("weight_bytes"), results["copy_gb_per_s"] * 1e3)
    return {
        "config": row["config"],
        "variant": row.get("variant", "-"),
        "provider": row["provider"],
        "prompt + new": f"{row.get('prompt_tokens', '-')} + {row.get('new_tokens', '-')}",
        "first token (ms)": number(first and first / 1e3),
        "per token (us)": number(us),
        "rate (tokens/s)": number(row.get("tokens_per_s")),
        "of the floor (%)": number(ratio(floor and floor * 100, us)),
        "speed-up over upstream (x)": number(ratio(upstream, us)),
        "state of a sequence (MiB)": number(state and state / 2**20),
    }


BENCHMARK = Benchmark(
    ("fused", "reference", "upstream"),
    (Table("Generation, as calls repeat; floor: weights of a token at the speed of a copy", line),),
    place=5,
    chart=partial(bars, "tokens_per_s", "rate (tokens/s), higher is better"),
)


@pytest.mark.parametrize("variant", BATCHES)
@torch.no_grad()
def bench_generate(benchmark, config, variant, provider):
    config, batch = shapes.configs(DEVICE)[config], BATCHES[variant]
    reference = build_reference(config)
    new = NEW if provider == "fused" else FEW[batch > 1]
    prompt_tokens = PROMPT + (NEW - new) // 2
    prompt = torch.randint(1, config.model["num_tokens"], (batch, prompt_tokens), device=DEVICE)
    with autocast():
        expected = reference(prompt)[:, -1]
        model = load(provider, reference, config)
        if provider != "upstream":
            model = model.to(DTYPE)
            decoder = Decoder(model, batch, prompt_tokens + new)
            logits = decoder.prefill(model, prompt[:, :-STEPS])
            for ids in prompt[:, -STEPS:].T:
                decoder.ids.copy_(ids)
                logits = decoder.step()
            benchmark.extra_info["state_bytes"] = decoder.state_bytes
            del decoder
        else:
            logits = model(prompt)[:, -1]
        check_agreement([logits], [expected], 5e-2 if DTYPE == torch.bfloat16 else 1e-4)
        times = [lambda count=count: model.generate(prompt, count) for count in (1, 1 + new)]
        first_ms, all_ms = median_ms(benchmark, *times, calls=1, rounds=3, warmup_rounds=WARMUPS)
    us = (all_ms - first_ms) / new * 1e3
    benchmark.extra_info |= {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new,
        "first_us": first_ms * 1e3,
        "us_per_token": us,
        "tokens_per_s": batch / us * 1e6,
        "weight_bytes": shapes.weight_bytes(config, batch),
    }
