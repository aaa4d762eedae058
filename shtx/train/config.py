"""The settings of a run: what they are, their checks, and how a checkpoint keeps them."""

import inspect
import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from shtx import HierarchicalTransformer, __version__
from shtx.model import Trunk
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer
from shtx.train import TrainError
from shtx.train.checkpoint import Checkpoint
from shtx.train.data import Source, check_split
from shtx.train.metrics import BYTE, Unit
from shtx.train.sources import unescape
from shtx.train.tokens import Tokens, tokens_of

# The identity of data. Under the keys of OTHERS it has the same for the files of these settings.
IDENTITY = {"bytes": int, "sha256": str}
OTHERS = {"val": "val_data", "test": "test_data"}
FILES = ("data", "val_data", "test_data")
MAX_DEPTH = 10_000
# values that runs had before these were settings, where they are not the defaults
BEFORE = {"betas": (0.9, 0.95), "decayed": "all"}


@dataclass(frozen=True)
class Model:
    """Arguments of HierarchicalTransformer; a tuple has a value a level, or one for all."""

    dim: tuple[int, ...]
    """Width."""
    depth: int
    """Layers."""
    seq_len: int
    """Bytes, or tokens, the model sees at once."""
    hierarchies: tuple[int, ...]
    """Compression of each level: different powers of two."""
    num_tokens: int | None = None
    """Vocabulary of --data that is token ids, in .bin or .npy files, and of the model; None: bytes,
    or what `shtx data prepare` has left beside the file. Every id counts for the next token; 0
    never does in the reconstruction, as upstream pads with it."""
    hierarchical_stride: tuple[int, ...] = (1,)
    """Bytes per token of the level; 1 for the level that predicts."""
    window_sizes: tuple[int | None, ...] = (None,)
    """Tokens of the level that a token looks back on; None: all, 0: no attention."""
    dim_head: tuple[int, ...] = (64,)
    """Width of an attention head."""
    heads: tuple[int, ...] = (8,)
    """Attention heads."""
    ff_mult: tuple[float, ...] = (4,)
    """Inner width of the feed-forward over --dim."""
    hierarchy_merge_all: bool = False
    """Merge into all levels rather than the predicting one alone."""
    predict_hierarchy: int | None = None
    """The level that predicts; None: the least compressed."""
    predict_use_all_hierarchy: bool = False
    """Predict from all levels side by side."""
    recon_loss_weight: float = 0.1
    """Weight of the loss that reconstructs the bytes of a level token; 0 leaves it out."""
    objective: Literal["hierarchical-ar", "next-latent", "none"] = "hierarchical-ar"
    """What levels learn besides the next byte and its reconstruction: to predict their next token
    (upstream 0.2.0), to foretell their latents (upstream 0.4.0, with the flags from
    --next-latent-loss-weight on), or nothing."""
    hierarchical_ar_loss_weight: float = 0.25
    """Weight of the loss that predicts the next token of a level."""
    next_latent_loss_weight: tuple[float, ...] = (0.25,)
    """Weight of the loss of foretold latents; a level of weight 0 is left out."""
    next_latent_loss_type: Literal["mse_and_cosine_sim", "mse", "smooth_l1"] = "mse_and_cosine_sim"
    """How far a foretold latent is from the one that came."""
    num_rollouts: int = 1
    """How many latents are foretold, one after the other."""
    detach_summaries: bool = True
    """Whether what tells of the next bytes does not train their embeddings."""
    dynamics_hidden_dim: int | None = None
    """Inner width of the dynamics; None: that of the level."""
    dynamics_num_layers: int = 3
    """Linear layers of the dynamics."""
    dynamic_rollout_loss_weight: bool = True
    """Weigh what is foretold after a bad guess less."""
    dynamic_loss_decay: float = 1.0
    """How much less."""
    rollout_weights: tuple[float, ...] | None = None
    """One for each of --num-rollouts; None: all alike."""

    @property
    def kind(self) -> type[Trunk]:
        """The model that has this objective."""
        return NextLatentTransformer if self.objective == "next-latent" else HierarchicalTransformer

    def arguments(self) -> dict:
        """Return the arguments that `kind` takes."""
        given = {
            k: v[0] if isinstance(v, tuple) and len(v) == 1 and k != "rollout_weights" else v
            for k, v in asdict(self).items()
            if k in self._taken()
        }
        if self.objective == "none":
            given["hierarchical_ar_loss_weight"] = 0.0
        given["num_tokens"] = self.num_tokens or 256
        return dict(given, ignore_index=-1)  # -1: no byte is left out

    def without_effect(self) -> list[str]:
        """Settings that are not at their default, and that the objective has no use for."""
        known = self._taken() | {"objective"}
        others = (f for f in fields(self) if f.name not in known)
        return [f.name for f in others if getattr(self, f.name) != f.default]

    def _taken(self) -> set[str]:
        taken = set(inspect.signature(self.kind.__init__).parameters)
        return taken - {"hierarchical_ar_loss_weight"} if self.objective == "none" else taken


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")] = ()
    """What to train on: files, directories (all files in them that are not hidden) or patterns like
    'text/*.txt', one after the other; by default the sources of this Python's standard library.
    Plain bytes stay where they are; a .gz, .bz2, .xz, .zst, .zip, .tar or .tar.gz and the like is
    unpacked into --out, and the other files with it."""
    separator: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    r"""What comes between two files, and between two members of an archive: text in UTF-8, in which
    \n, \t, \r, \0, \\ and \xNN stand for these bytes."""
    split: Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="SHARE...")] = None
    """Shares of --data for training, for validation and, if there is a third one, for the test,
    in its order; None: 0.9 0.1, or all of it for training where --val-data is given. `shtx eval
    --split test` scores what this leaves untouched."""
    val_data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")] = ()
    """Files for validation, as --data takes them, in place of a part of --data."""
    test_data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")] = ()
    """Files for `shtx eval --split test`, in place of a part of --data: no training looks at
    them."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """Integer type of the token ids; None: uint16 where --num-tokens allows it."""
    bytes_per_token: tyro.conf.Suppress[float | None] = None
    """In the mean over --data, where `shtx data prepare` has left it."""
    tokenizer: tyro.conf.Suppress[str | None] = None
    """The sha256 of the tokenizer that made the token ids, where `shtx data prepare` has."""
    raw: bool = False
    """Take the bytes of files as they are, packed or not."""
    preset: Literal["cpu", "gpu", "enwik8"]
    """Where settings that are not given come from; gpu if there is one. enwik8 is 40M parameters
    for one GPU, and the first 90%, the next 5% and the last 5% of enwik8.zip."""
    steps: int
    """Steps in all, those before --resume included."""
    batch_size: int
    """Sequences a step, over all processes."""
    accumulate: int = 1
    """Micro-batches that each process splits its sequences into: less memory, the same step."""
    lr: float
    """Peak learning rate: --warmup leads to it, --schedule away from it."""
    schedule: Literal["cosine", "wsd", "constant", "minimum"] = "cosine"
    """How the learning rate falls to --min-lr. cosine: all the way to --steps. wsd: in the last
    fifth alone, which older versions called constant, and so resume. constant: never. minimum: a
    cosine whose end stays where it is when --resume raises --steps."""
    curve: tyro.conf.Suppress[int | None] = None
    """Steps of the schedule; None: all."""
    warmup: int | None = None
    """Steps in which the learning rate rises to --lr; None: a twentieth of all."""
    min_lr: float | None = None
    """Where the learning rate ends; None: a fiftieth of --lr."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms, biases and embeddings have none."""
    decayed: tyro.conf.Suppress[Literal["matrices", "all"]] = "matrices"
    """What --weight-decay is of; runs of older versions: all."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of blocks and AdamW for the rest, of one learning rate."""
    level_lr: tuple[float, ...] = (1.0,)
    """What multiplies the learning rate of each level's own weights."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's means of gradients and of their squares."""
    ema: float | None = None
    """How much of an average of the weights a step keeps, as 0.999: checkpoints have it, too, and
    validations and samples are of it. None: no average."""
    grad_clip: float | None = 1.0
    """Greatest norm of all gradients together; None: any."""
    precision: Literal["fp32", "tf32", "bf16-mixed", "fp16-mixed"]
    """Precision of matrix products; weights are fp32."""
    shard: Literal["none", "optimizer", "full"] = "none"
    """What each of several processes keeps a share of, for less memory: nothing, the state of the
    optimizer, or all of it and the weights, too (FSDP2), of which every process writes its part of
    a checkpoint."""
    impl: Literal["auto", "fused", "reference"] = "auto"
    """Fused ops, reference ops, or whichever suits the device."""
    activation_checkpointing: bool = False
    """Run blocks again in the backward: less memory, longer steps, the same result."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, and the sample."""
    device: str
    """cpu, cuda, cuda:1, ..."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where metrics, checkpoints and the plot go; by default runs/ and the time, or where the run
    that is resumed is."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Settings in JSON, over those of --preset and under flags: a run's run.json, or some of the
    settings in there."""
    init_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Begin with the weights of this run's newest checkpoint, or of this checkpoint, and with
    nothing else of it; the model's settings are its own where they are not given."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Continue the run in this directory from its newest checkpoint, or from this checkpoint of it,
    giving up the later ones; with another --out there, leaving the run as it is. The settings are
    those of the run; --steps may be raised, and what does not change what it learns may differ."""
    resume_fallback: bool = False
    """If the checkpoint is damaged, continue from the newest good one before it; what is damaged
    is kept under another name."""
    log_every: int = 10
    """Steps between lines of progress."""
    eval_every: int
    """Steps between validations."""
    eval_sequences: int
    """Validation sequences, evenly spaced."""
    save_every: int
    """Steps between checkpoints."""
    keep: int = 2
    """How many checkpoints are kept, the newest."""
    keep_best: bool = True
    """Save and keep that of the best validation, too."""
    sample_every: int | None = None
    """Steps between samples; None: one at the end."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """What else gets the rows of metrics.jsonl: event files under --out, or Weights & Biases."""
    model: tyro.conf.OmitArgPrefixes[Model]

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "eval_every",
            "save_every",
            "log_every",
            "eval_sequences",
            "keep",
            *(["sample_every"] if self.sample_every is not None else []),
        ):
            if not 1 <= getattr(self, name) < 2**63:
                raise TrainError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.precision == "fp16-mixed" and self.shard != "none":
            raise TrainError(f"--shard must be none for fp16-mixed, got {self.shard}")
        if self.precision == "fp16-mixed" and self.optimizer != "adamw":
            raise TrainError(f"--optimizer must be adamw for fp16-mixed, got {self.optimizer}")
        if idle := self.model.without_effect():
            raise TrainError(
                f"{flag(idle[0])} has no effect with --objective {self.model.objective}:"
                f" it takes {'hierarchical-ar' if 'hierarchical' in idle[0] else 'next-latent'}"
            )
        if self.model.depth > MAX_DEPTH:
            raise TrainError(f"--depth must be at most {MAX_DEPTH:,}, got {self.model.depth}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise TrainError(f"--lr must be positive and finite, got {self.lr}")
        if self.warmup is not None and not 0 <= self.warmup < 2**63:
            raise TrainError(f"--warmup must be at least 0 or None, got {self.warmup}")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise TrainError(f"--min-lr must be 0 to --lr {self.lr}, got {self.min_lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise TrainError(
                f"--weight-decay must be at least 0 and finite, got {self.weight_decay}"
            )
        levels = len(self.model.hierarchies)
        fits = len(self.level_lr) in (1, levels)
        if not fits or not all(0 <= m < math.inf for m in self.level_lr):
            raise TrainError(
                f"--level-lr must be one number, or {levels}, one for each of --hierarchies, at"
                f" least 0 and finite, got {self.level_lr}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrainError(f"--betas must be two numbers in [0, 1), got {self.betas}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise TrainError(f"--ema must be in [0, 1) or None, got {self.ema}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise TrainError(f"--grad-clip must be above 0 or None, got {self.grad_clip}")
        if not 0 <= self.seed < 2**63:
            raise TrainError(f"--seed must be in [0, 2^63), got {self.seed}")
        self._check_data()

    def _check_data(self) -> None:
        unescape(self.separator)
        if self.tokens is not None:
            vocabulary = self.model.num_tokens
            if not self.data:
                raise TrainError(f"--num-tokens {vocabulary} takes --data with token ids")
            for name in ("raw", "separator"):
                if getattr(self, name):
                    raise TrainError(f"{flag(name)} is for bytes, and --num-tokens for token ids")
        if self.split is None:
            return
        check_split(self.split)
        given = " ".join(map(str, self.split))
        if self.val_data:
            raise TrainError(
                f"--split {given}: --val-data takes the place of a part of --data; --split None"
                " leaves that whole"
            )
        if self.test_data and len(self.split) == 3:
            raise TrainError(f"--split {given}: its third share and --test-data are both the test")

    @property
    def source(self) -> Source:
        """The files of the data, and how they are taken."""
        return Source(
            data=self.data,
            val=self.val_data,
            test=self.test_data,
            split=self.split,
            separator=unescape(self.separator),
            raw=self.raw,
            tokens=self.tokens,
        )

    @property
    def tokens(self) -> Tokens | None:
        """The vocabulary and type of token ids; None where the data is bytes."""
        return tokens_of(self.model.num_tokens, self.token_dtype)

    @property
    def unit(self) -> Unit:
        """The unit that the model predicts: a byte or a token."""
        return BYTE if self.model.num_tokens is None else Unit("token", self.bytes_per_token)

    def to_json(self) -> dict:
        """Return the settings that a resumed run needs. The run's directory is none of them."""
        files = {name: [str(p.resolve()) for p in getattr(self, name)] for name in FILES}
        start = self.init_from and str(self.init_from.resolve())
        here = dict(out=None, resume=None, resume_fallback=False, config=None)
        return asdict(replace(self, **here)) | {
            **files,
            "init_from": start,
            "defaults": _at_default(self) + _at_default(self.model),
        }

    @classmethod
    def from_json(
        cls,
        values: dict,
        source: Path | str = "settings",
        version: str = __version__,
        fault: str = "damaged: ",
    ) -> "Config":
        """The settings that `to_json` of this version or of another gave.

        Args:
            values: JSON.
            source, version: the file they are from, and the version that wrote it.
            fault: what a malformed setting is of the file.

        Raises:
            TrainError: a setting is malformed, or is not at its default and unknown here, or
                missing and without a default.
        """
        if "decayed" not in values and values.get("schedule") == "constant":
            values = values | {"schedule": "wsd"}
        values = {name: as_json(value) for name, value in BEFORE.items()} | values
        ignored = values.pop("defaults", [])
        model = values.get("model")
        if not isinstance(model, dict) or not isinstance(ignored, list):
            raise TrainError(f"{source}: damaged: not the settings of a run")
        unknown, missing, kept = [], [], []
        for part, given in ((Model, model), (cls, values)):
            known = {f.name: f for f in fields(part)}
            unknown += [f"{k}={v!r}" for k, v in given.items() if k not in (*known, *ignored)]
            missing += [n for n, f in known.items() if n not in given and f.default is MISSING]
            kept.append({k: v for k, v in given.items() if k in known})
        if unknown or missing:
            lists = [("does not know", unknown), ("needs, and which are missing", missing)]
            what = "; ".join(f"settings that this one {w}: {', '.join(n)}" for w, n in lists if n)
            raise TrainError(
                f"{source}: written by shtx {version}, this is shtx {__version__}; {what}"
            )
        model, values = kept
        del values["model"]
        if isinstance(data := values.get("data", ()), str | None):  # older versions had one file
            values["data"] = [] if data is None else [data]
        for part, given in ((Model, model), (cls, values)):
            hints = get_type_hints(part)
            for name, value in given.items():
                if not _fits(value, hints[name]):
                    raise TrainError(f"{source}: {fault}{name} cannot be {value!r}")
        tuples = lambda part: {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
        named = "init_from", "out", "resume", "config"
        paths = {k: v and Path(v) for k, v in values.items() if k in named}
        paths |= {k: tuple(map(Path, v)) for k, v in values.items() if k in FILES}
        return cls(**tuples(values) | paths | {"model": Model(**tuples(model))})


def as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _at_default(settings) -> list[str]:
    """Settings that another version can do without, if it does not know them."""
    needless = {f.name: BEFORE.get(f.name, f.default) for f in fields(settings)}
    return [name for name, value in needless.items() if getattr(settings, name) == value]


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a setting."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind is tuple:
        sized = (
            arguments[-1] is Ellipsis or isinstance(value, list) and len(value) == len(arguments)
        )
        return isinstance(value, list) and sized and all(_fits(v, arguments[0]) for v in value)
    accepted = {float: (int, float), Path: (str,)}.get(hint, (hint,))
    return type(value) in accepted


def settings_of(checkpoint: Checkpoint) -> Config:
    """The settings of the run that wrote a checkpoint."""
    versions = checkpoint.config.get("versions")
    version = versions.get("shtx") if isinstance(versions, dict) else None
    source = checkpoint.path / "config.json"
    data = checkpoint.config.get("data")
    data = data if isinstance(data, dict) else {}
    others = [data[name] for name in data if name in OTHERS]
    whole = {name: value for name, value in data.items() if name not in OTHERS}
    for identity in (whole, *others):
        known = isinstance(identity, dict) and {k: type(v) for k, v in identity.items()}
        if known != IDENTITY:
            raise TrainError(f"{source}: damaged: no identity of the data")
    return Config.from_json(checkpoint.config.get("run") or {}, source, version or "(unknown)")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
