"""The optimizers of a run, and which parameters they have in which groups."""

import re

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from shtx.model import Trunk
from shtx.muon import Muon
from shtx.train.config import Config

LISTS = "compressors|post_token_emb_norms|norms|to_hierarchical_preds|chunk_summarizers"
OF_A_LEVEL = re.compile(rf"(?:layers\.\d+|{LISTS}|latent_dynamics)\.(\d+)\.")
# the states that they keep in the shape of a parameter
MOMENTS = {AdamW: {"exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}


def optimizers_of(config: Config, model: Trunk) -> list[Optimizer]:
    """AdamW, or Muon for the matrices of blocks and AdamW for the rest.

    A group has an "lr_scale", by which the learning rate of its levels is multiplied.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    scales = config.level_lr * (1 if len(config.level_lr) > 1 else len(model.levels))
    groups = {AdamW: {}, Muon: {}}
    for name, p in model.named_parameters():
        is_matrix = p.ndim >= 2 and p not in embeddings
        is_inner = config.optimizer == "muon" and name.startswith("layers.") and p.ndim == 2
        level = OF_A_LEVEL.match(name)
        scale = scales[int(level[1])] if level else 1.0
        decay = config.weight_decay if is_matrix or config.decayed == "all" else 0.0
        group = dict(params=[], weight_decay=decay, lr_scale=scale)
        kind = Muon if is_inner else AdamW
        groups[kind].setdefault((decay, scale), group)["params"].append(p)
    adamw = list(groups[AdamW].values())
    optimizers = [torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, fused=True)]
    if muon := list(groups[Muon].values()):
        # Muon's steps become as long as AdamW's, so that one learning rate suits both.
        optimizers.append(Muon(muon, lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers
