"""Generation, one sequence at a time under bf16 autocast."""

import torch

from benchmarks import shapes
from benchmarks.providers import build_reference, load
from benchmarks.timing import DEVICE, DTYPE, autocast, check_agreement, median_ms

PROMPT, NEW = (128, 32) if DEVICE == "cuda" else (16, 4)


@torch.no_grad()
def bench_generate(benchmark, config, provider):
    config = shapes.configs(DEVICE)[config]
    reference = build_reference(config)
    prompt = torch.randint(1, config.model["num_tokens"], (1, PROMPT), device=DEVICE)
    with autocast():
        expected = reference(prompt)
        model = load(provider, reference, config)
        check_agreement([model(prompt)], [expected], 5e-2 if DTYPE == torch.bfloat16 else 1e-4)
        (ms,) = median_ms(benchmark, lambda: model.generate(prompt, NEW), calls=1, rounds=3)
    benchmark.extra_info |= {
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "ms_per_token": ms / NEW,
        "tokens_per_s": NEW / ms * 1e3,
        "weight_bytes": shapes.weight_bytes(config),
    }
