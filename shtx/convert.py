"""A state_dict of simple-hierarchical-transformer 0.2.0 as one of 0.4.0, and back.

Logits stay as they are. Full attention pairs other channels, so the rows of its queries and keys
change places. What belongs to the losses of one version alone is left out, and that of the other
is as it is in a new model.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Linear

from shtx.layers import rotary_buffers
from shtx.next_latent import LatentDynamics
from shtx.ops import halves, neighbours
from shtx.versions import MODULES, version_of

OF_LOSSES = (
    "to_hierarchical_preds.",
    "chunk_summarizers.",
    "latent_dynamics.",
    "next_latent_loss_fn.",
)
ROTARY = ".rotary_emb."


def convert(
    state: dict[str, Tensor],
    to: str,
    *,
    dynamics_hidden_dim: int | None = None,
    dynamics_num_layers: int = 3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Convert a checkpoint.

    Args:
        state: a state_dict, which stays as it is.
        to: "0.2.0" or "0.4.0".
        dynamics_hidden_dim: that argument of the 0.4.0 model that is to load it.
        dynamics_num_layers: the same.
        seed: of the weights that are new.

    Returns:
        the state_dict of a model with the same arguments.

    Raises:
        ValueError: naming what cannot be converted.
    """
    if to not in MODULES:
        raise ValueError(f"to must be {' or '.join(map(repr, MODULES))}, got {to!r}")
    if "token_emb.weight" not in state:
        raise ValueError(
            "state must be the state_dict of a HierarchicalTransformer, with token_emb.weight,"
            f" got keys {', '.join(map(str, list(state)[:3]))}, ..."
        )
    found = version_of(state)
    if found is not None and (found == to or found not in MODULES):
        raise ValueError(f"state must be of another version than {to} and of 0.3.0, got {found}")
    turn = neighbours if to == "0.4.0" else halves
    trunk = {key: t for key, t in state.items() if not key.startswith(OF_LOSSES)}
    trunk = dict(item for key, t in trunk.items() for item in _entries(state, key, t, turn))
    own = _new(state, to, dynamics_hidden_dim, dynamics_num_layers, seed)
    at = "token_emb." if to == "0.2.0" else ("token_emb.", "compressors.")
    before = {key: t for key, t in trunk.items() if key.startswith(at)}
    return before | own | trunk  # in the order of the version


def _entries(state: dict, key: str, t: Tensor, turn: Callable) -> list[tuple[str, Tensor]]:
    """Return what an entry of the trunk becomes."""
    attn = key.partition(".attn.")[0] + ".attn"
    names = (f"{attn}{ROTARY}{name}" for name in ("inv_freq", "freqs"))
    frequencies = [state[name] for name in names if name in state]
    if not frequencies:  # not of full attention
        return [(key, t)]
    if key == f"{attn}.to_qkv.weight":
        E = 2 * len(frequencies[0])
        q, k, v = t.chunk(3)
        return [(key, torch.cat((*(_turned(rows, E, turn) for rows in (q, k)), v)))]
    if key.startswith(attn + ROTARY):
        if turn is neighbours:
            return [(f"{attn}{ROTARY}freqs", t)] if key.endswith("inv_freq") else []
        scale = rotary_buffers(2 * len(t), t.device)["scale"].to(t.dtype)
        return [(f"{attn}{ROTARY}inv_freq", t), (f"{attn}{ROTARY}scale", scale)]
    return [(key, t)]


def _turned(rows: Tensor, E: int, turn: Callable) -> Tensor:
    """Rows (H E, d), whose pairs of channels are elsewhere."""
    return turn(rows.unflatten(0, (-1, E)).mT).mT.flatten(0, 1)


def _new(state: dict, to: str, hidden_dim, num_layers: int, seed: int) -> dict[str, Tensor]:
    """The weights of losses that the version has and the other has not."""
    embedding = state["token_emb.weight"]
    like = dict(dtype=embedding.dtype, device=embedding.device)
    dims, new = [], {}
    while (norm := state.get(f"norms.{len(dims)}.weight")) is not None:
        dims.append(len(norm))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, dim in enumerate(dims):
            if to == "0.2.0":
                if f"compressors.{i}.compress_fn.1.conv.weight" in state:
                    new[f"to_hierarchical_preds.{i}"] = Linear(dim, dim)
                continue
            if dim != embedding.shape[1]:
                new[f"chunk_summarizers.{i}.proj"] = Linear(embedding.shape[1], dim)
            new[f"latent_dynamics.{i}"] = LatentDynamics(dim, hidden_dim, num_layers)
    ordered = sorted(new, key=lambda name: name.partition(".")[0])
    states = {name: new[name].to(**like).state_dict() for name in ordered}
    return {f"{name}.{key}": t for name in ordered for key, t in states[name].items()}
