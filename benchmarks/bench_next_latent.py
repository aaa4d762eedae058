"""A train step of shtx.next_latent, with the default loss of foretold latents, as bench_model's.

`fused` is shtx.TrainStep, `fused-without` the same without that loss, whose weight is 0: their
ratio is what the loss costs. `upstream` is simple-hierarchical-transformer 0.4.0, which shares a
package name with 0.2.0, the peer of all other benchmarks. Put it in a folder of its own, before
what is installed:

    pip install --target FOLDER simple-hierarchical-transformer==0.4.0 --no-deps
    pip install --target FOLDER rotary-embedding-torch torch-einops-utils --no-deps
    PYTHONPATH=FOLDER python -m benchmarks next_latent
"""

import torch
from torch.nn import Module

from benchmarks import shapes
from benchmarks.bench_model import measure
from benchmarks.benchmark import Benchmark, Table
from benchmarks.cells import find, number, ratio
from benchmarks.providers import compiled
from benchmarks.timing import DEVICE
from shtx.next_latent import HierarchicalTransformer


def line(row: dict, rows: list[dict], results: dict) -> dict:
    without = find(rows, row, "fused-without").get("ms")
    upstream = find(rows, row, "upstream").get("ms")
    return {
        "config": row["config"],
        "provider": row["provider"],
        "step (ms)": number(row.get("ms")),
        "over TrainStep without the loss (x)": number(ratio(row.get("ms"), without)),
        "over TrainStep (x)": number(ratio(row.get("ms"), find(rows, row, "fused").get("ms"))),
        "speed-up over upstream (x)": number(ratio(upstream, row.get("ms"))),
        "throughput (tokens/s)": number(row.get("tokens_per_s")),
        "peak memory (GiB)": number(row.get("peak_gib")),
    }


BENCHMARK = Benchmark(
    (
        *("fused", "fused-without", "reference-compiled", "reference"),
        *("upstream-compiled", "upstream"),
    ),
    (Table("Train step with the loss of next latents; upstream: 0.4.0", line),),
    place=2,
    upstream="0.4.0",
    first_steps=True,
)


def build_reference(config: shapes.Config) -> Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return HierarchicalTransformer(**config.model, impl="reference")


def load(provider: str, reference: Module, config: shapes.Config) -> Module:
    """The provider's model, with the weights of `reference`."""
    model = reference
    if provider.startswith("fused"):
        model.impl = "fused"
    elif provider.startswith("upstream"):
        from simple_hierarchical_transformer import HierarchicalTransformer as Upstream

        with torch.device(DEVICE):
            model = Upstream(**config.model)
        model.load_state_dict(reference.state_dict())
    return compiled(model) if provider.endswith("-compiled") else model


def bench_next_latent(benchmark, config, provider, wait_for_turn):
    config = shapes.configs(DEVICE)[config]
    if provider == "fused-without":
        config = config._replace(model=config.model | dict(next_latent_loss_weight=0.0))
    measure(benchmark, config, provider, wait_for_turn, build_reference, load)
