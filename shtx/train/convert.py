"""`shtx convert`: weights for the other version of simple-hierarchical-transformer, or a model for
Hugging Face's transformers.
"""

import io
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
import tyro
from torch import Tensor

from shtx.convert import convert
from shtx.train import TrainError
from shtx.train.checkpoint import decode, load, whole
from shtx.train.config import settings_of
from shtx.train.files import publish, read
from shtx.versions import version_of

DESCRIPTION = """\
Make a file of weights for simple-hierarchical-transformer 0.2.0 (shtx) or 0.4.0 (shtx.next_latent)
from those of the other version, or from a run of `shtx train`; or of a run a folder that
transformers loads, after `import shtx.hf`, and pushes to the Hub.

Examples:
  shtx convert model-0.2.0.pt --to 0.4.0 --out model-0.4.0.pt
  shtx convert runs/enwik8 --to 0.2.0 --out enwik8.safetensors
  shtx convert runs/enwik8 --to hf --out enwik8-hf
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """A state_dict that torch.save wrote, or .safetensors; or a run, for its newest checkpoint, or
    one of its checkpoints."""
    to: Literal["0.2.0", "0.4.0", "hf"]
    """The version that is to load it; hf: transformers, as the version that it was trained as."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A new file, .pt or .safetensors; of --to hf a new folder."""
    dynamics_hidden_dim: int | None = None
    """That of the 0.4.0 model, whose dynamics are new."""
    dynamics_num_layers: int = 3
    """The number of its linear layers."""
    seed: int = 0
    """Seed of the weights that are new."""


def main(argv: list[str]) -> int:
    """Write what the arguments ask for."""
    options = tyro.cli(Options, args=argv, prog="shtx convert", description=DESCRIPTION)
    source, out, to = options.source, options.out, options.to
    if to == "hf":
        return write_folder(source, out)
    if out.suffix not in (".pt", ".safetensors"):
        raise TrainError(
            f"--out {out}: must end in .pt or .safetensors: a run has data, settings and the state"
            " of an optimizer, too, which weights do not tell"
        )
    if out.exists():
        raise TrainError(f"--out {out}: is there already")
    state = weights_of(source)
    if not (source.is_dir() and version_of(state) == to):
        sizes = {k: getattr(options, k) for k in ("dynamics_hidden_dim", "dynamics_num_layers")}
        try:
            state = convert(state, to, **sizes, seed=options.seed)
        except ValueError as error:
            raise TrainError(f"{source}: {error}") from error
    write(out, state)
    print(f"{out}: {len(state)} tensors, for simple-hierarchical-transformer {to}")
    return 0


def write_folder(source: Path, out: Path) -> int:
    """A folder for transformers' from_pretrained, which is there whole, or not at all."""
    if find_spec("transformers") is None:
        raise TrainError('--to hf: transformers not installed: pip install "shtx[hf]"')
    from shtx.hf import HierarchicalConfig, HierarchicalTransformerForCausalLM

    if not source.is_dir():
        raise TrainError(
            f"{source}: must be a run, or one of its checkpoints, for --to hf: a file of weights"
            " does not tell the options of its model"
        )
    if out.exists():
        raise TrainError(f"--out {out}: is there already")
    checkpoint = whole(load(source.absolute()))
    settings, weights = settings_of(checkpoint).model, checkpoint.weights
    config = HierarchicalConfig(settings.kind.version, **settings.arguments())
    model = HierarchicalTransformerForCausalLM(config).to(weights["token_emb.weight"].dtype)
    model.model.load_state_dict(weights)
    temporary = out.with_name(f"{out.name}.tmp")
    model.save_pretrained(temporary)
    publish(temporary, out)
    print(f"{out}: {len(weights)} tensors, for transformers, after import shtx.hf")
    return 0


def weights_of(source: Path) -> dict[str, Tensor]:
    """The state_dict in a file, or of a run."""
    if source.is_dir():
        return whole(load(source.absolute())).weights
    content = read(source)
    if source.suffix == ".safetensors":
        return decode(source, lambda: safetensors.torch.load(content))
    options = dict(weights_only=True, map_location="cpu")
    state = decode(source, lambda: torch.load(io.BytesIO(content), **options))
    if not all(isinstance(t, Tensor) for t in state.values()):
        raise TrainError(f"{source}: must be a state_dict, of names and tensors alone")
    return state


def write(out: Path, state: dict[str, Tensor]) -> None:
    """A file that is there whole, or not at all."""
    temporary = out.with_name(f"{out.name}.tmp")
    if out.suffix == ".pt":
        torch.save(state, temporary)
    else:
        safetensors.torch.save_file({k: t.contiguous() for k, t in state.items()}, temporary)
    publish(temporary, out)
