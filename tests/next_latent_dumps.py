"""Dumps what simple-hierarchical-transformer 0.4.0 computes, for tests/test_next_latent.py.

Its package has the name of 0.2.0's, so it cannot stand beside it. In an environment of its own:

    pip install torch numpy simple-hierarchical-transformer==0.4.0
    python tests/next_latent_dumps.py  # writes tests/data/next_latent.npz, and its size

Weights and ids are drawn from seeds, so that they need not be kept. Of every tensor its largest
magnitude is kept, and its projections on random directions: what is off in one element is off in
all of them.
"""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import torch
from covering import COUNT, FACTORS, TOKENS, build, covering_rows
from torch import Tensor, nn

PATH = Path(__file__).parent / "data/next_latent.npz"
PROJECTIONS = 6
SEEDED, GENERATED = (0, 7, 21), (1, 5, 9)  # rows of which initial weights and tokens are kept

LOSSES = FACTORS | dict(
    hierarchical_ar_loss_weight=[0.0],
    heads=[1, 2],
    ff_mult=[2],
    dim_head=[4, 6],
    tokens=[33, 34, 48, "shortest"],
    ignored_row=[False, True],
    loss_type=["mse_and_cosine_sim", "mse", "smooth_l1", "callable", "module"],
    num_rollouts=[1, 2, 3],
    weights=["one", "some zero", "different"],
    summarizers=[None, "convolutions", "shared"],
    detach_summaries=[True, False],
    dynamics_hidden_dim=[None, 10],
    dynamics_num_layers=[1, 2, 3, 4],
    dynamic_rollout_loss_weight=[True, False],
    dynamic_loss_decay=[1.0, 0.3],
    rollout_weights=["default", "falling"],
)


class Convolution(nn.Module):
    """A summarizer of one's own."""

    def __init__(self, dim_embed, dim, stride):
        super().__init__()
        self.conv = nn.Conv1d(dim_embed, dim, 3, stride=stride)

    def forward(self, x):
        return self.conv(nn.functional.pad(x.mT, (2, 0))).mT


class Weighted(nn.Module):
    """A loss of one's own, with a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, predicted, target):
        return self.weight * (predicted - target).square()


def absolute(predicted, target):
    return (predicted - target).abs()


def settings(row: dict) -> tuple[dict, int] | None:
    """Arguments without their modules, and how many ids; None where 0.4.0 has no loss."""
    options = build(row | dict(tokens=0))
    if options is None:
        return None
    del options["hierarchical_ar_loss_weight"]
    strides, R = options["hierarchical_stride"], row["num_rollouts"]
    strides = strides if isinstance(strides, tuple) else (strides,)
    tokens = max(strides) * R + 2 if row["tokens"] == "shortest" else row["tokens"]
    if tokens > TOKENS or math.ceil((tokens - 1) / max(strides)) <= R:
        return None
    count, dims = len(strides), options["dim"]
    alike = count == 1 or (isinstance(dims, int) and len(set(strides)) == 1)
    if row["summarizers"] == "shared" and not alike:
        return None
    weights = {
        "one": 0.25,
        "some zero": tuple(float(i % 2) for i in range(1, count + 1)),
        "different": tuple(0.2 + 0.3 * i for i in range(count)),
    }[row["weights"]]
    falling = tuple(3.0 - i for i in range(R))
    same = ("num_rollouts", "detach_summaries", "dynamics_hidden_dim", "dynamics_num_layers")
    same += ("dynamic_rollout_loss_weight", "dynamic_loss_decay")
    options |= {name: row[name] for name in same} | dict(
        next_latent_loss_weight=weights,
        next_latent_loss_type=row["loss_type"],
        chunk_summarizers=row["summarizers"],
        rollout_weights=None if row["rollout_weights"] == "default" else falling,
    )
    return options, tokens


def with_modules(options: dict) -> dict:
    """The arguments of a row as a constructor takes them."""
    levels, dims, strides = (options[k] for k in ("hierarchies", "dim", "hierarchical_stride"))
    count = len(levels) if isinstance(levels, (tuple, list)) else 1
    each = lambda value: value if isinstance(value, (tuple, list)) else (value,) * count
    convolution = lambda i: Convolution(max(each(dims)), each(dims)[i], each(strides)[i])
    summarizers = {
        None: lambda: None,
        "convolutions": lambda: [convolution(i) if i % 2 == 0 else None for i in range(count)],
        "shared": lambda: convolution(0),
    }[options["chunk_summarizers"]]
    kind = options["next_latent_loss_type"]
    kind = {"callable": absolute, "module": Weighted()}.get(kind, kind)
    return options | dict(chunk_summarizers=summarizers(), next_latent_loss_type=kind)


def seeded(make: type, options: dict, **more) -> nn.Module:
    """The model of a row, with the initial weights of a seed."""
    torch.manual_seed(5)
    return make(**with_modules(options), **more)


def fill(model: nn.Module) -> nn.Module:
    """Weights with which no error hides: at first, dynamics do nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith(".freqs"):
            continue
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scale = 0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
        is_gain = p.ndim < 2 and not name.endswith("bias")
        p.data.copy_(is_gain + scale * noise)
    return model


def draw(options: dict, tokens: int, ignored_row: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, options["num_tokens"], (2, tokens), generator=generator)
    if ignored_row and options["ignore_index"] >= 0:
        ids[1] = options["ignore_index"]
    return ids


def project(t: Tensor) -> np.ndarray:
    """The largest magnitude of a tensor, and its projections."""
    t = t.detach().double().cpu().flatten()
    generator = torch.Generator().manual_seed(t.numel())
    size = (PROJECTIONS, t.numel())
    directions = torch.randn(size, generator=generator, dtype=torch.float64)
    return torch.cat((t.abs().amax()[None], directions @ t / t.numel() ** 0.5)).numpy()


def results(model: nn.Module, ids: Tensor, ablate: bool) -> dict[str, Tensor]:
    """All that a model returns, and the gradients of all its parameters, by name."""
    off = dict(ablate_hierarchical_merge=ablate)
    found = {}
    for name in ("return_hierarchical_token_embeds", "return_hierarchical_embeds"):
        for i, level in enumerate(model(ids[:, :-1], **{name: True}, **off)):
            found[f"{name}.{i}"] = level
    found["logits"], _ = model(ids[:, :-1], return_logits_and_embeds=True, **off)
    loss, (ce, latent, recon, levels) = model(ids, return_loss=True, **off)
    loss.backward()
    found |= dict(loss=loss, next_token=ce, next_latent=latent, recon=recon)
    found |= {f"level.{i}": level for i, level in enumerate(levels)}
    for name, p in model.named_parameters():
        found[f"gradient.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return found


def exact_rotary(model: nn.Module) -> nn.Module:
    """The oracle in fp64, with angles that are fp64, too."""
    model = model.double()
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            E = 2 * len(module.freqs)
            channel = torch.arange(0, E, 2, dtype=torch.float64)
            module.freqs.data = 10000 ** (-channel / E)
            module.scale = (channel + 0.4 * E) / (1.4 * E)
        if name.endswith("rel_pos"):
            E = 2 * len(module.inv_freq)
            module.inv_freq = 10000 ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)
    return model


def parameters_of(function) -> dict:
    return {name: p.default for name, p in list(inspect.signature(function).parameters.items())[1:]}


def main():
    from importlib.metadata import version

    from simple_hierarchical_transformer import HierarchicalTransformer as Upstream

    assert version("simple-hierarchical-transformer") == "0.4.0"
    rows = covering_rows(LOSSES, lambda row: settings(row) is not None, 700)
    assert len(rows) >= COUNT
    kept, arrays = [], {}
    for i, row in enumerate(rows):
        options, tokens = settings(row)
        model, sampler = (seeded(Upstream, options) for _ in range(2))  # a forward leaves caches
        entry = dict(options=options, tokens=tokens, ignored_row=row["ignored_row"])
        entry |= dict(ablate=row["ablate"], keys=list(model.state_dict()))
        entry["shapes"] = [list(t.shape) for t in model.state_dict().values()]
        if i in SEEDED:
            arrays[f"{i}.initial"] = np.stack([project(t) for t in model.state_dict().values()])
        fill(model)
        if i in GENERATED:
            fill(sampler)
            torch.manual_seed(3)
            prompt = draw(options | dict(num_tokens=19), 5, False)
            entry["tokens_of_seed_3"] = sampler.generate(prompt, 9, 0.7, 0.5).tolist()
        ids = draw(options, tokens, row["ignored_row"])
        found = results(exact_rotary(model), ids, row["ablate"])
        entry["names"] = list(found)
        arrays[f"{i}.results"] = np.stack([project(t) for t in found.values()])
        kept.append(entry)
    signatures = {
        name: {k: repr(v) for k, v in parameters_of(getattr(Upstream, name)).items()}
        for name in ("__init__", "forward", "generate")
    }
    about = json.dumps(dict(rows=kept, signatures=signatures))
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, about=np.frombuffer(about.encode(), np.uint8), **arrays)
    print(f"{PATH}: {len(kept)} rows, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
