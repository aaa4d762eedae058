"""The runs of the study: which model is trained on what, and how."""

from typing import NamedTuple

SEQ_LEN = 2048  # bytes
BATCH = 32  # sequences a step
WINDOW = 256  # bytes that a byte looks back on; level tokens of the most compressed level: on all


class Shape(NamedTuple):
    """A model's levels; their widths and the layers are what makes it as large as its size says."""

    dim: tuple[int, ...]
    depth: int
    hierarchies: tuple[int, ...] = (1,)
    strides: tuple[int, ...] = (1,)

    def arguments(self) -> dict:
        """Return the settings of `shtx train` for a model."""
        coarse = [None] * (len(self.dim) > 1)
        return dict(
            dim=self.dim,
            depth=self.depth,
            seq_len=SEQ_LEN,
            heads=[dim // 64 for dim in self.dim],
            hierarchies=self.hierarchies,
            hierarchical_stride=self.strides,
            window_sizes=[WINDOW] * (len(self.dim) - len(coarse)) + coarse,
        )


LEARNING_RATES = {"25M": 1e-3, "85M": 6e-4}
# Hierarchies and strides; then widths and layers, for parameters within 4% of each size. The flat
# one has one level: a windowed transformer over bytes.
LEVELS = {
    "flat": ((1,), (1,), {"25M": ((512,), 8), "85M": ((768,), 12)}),
    "1, 4": ((1, 4), (1, 1), {"25M": ((256, 256), 12), "85M": ((512, 512), 10)}),
    "1, 2, 8": ((1, 2, 8), (1, 1, 1), {"25M": ((256, 256, 256), 7), "85M": ((384, 384, 384), 12)}),
    "1, 4 by 4": ((1, 4), (1, 4), {"25M": ((320, 384), 6), "85M": ((512, 512), 10)}),
    "1, 16 by 8": ((1, 16), (1, 8), {"25M": ((256, 256), 10), "85M": ((320, 576), 10)}),
}
SHAPES = {
    size: {
        name: Shape(*sizes[size], hierarchies, strides)
        for name, (hierarchies, strides, sizes) in LEVELS.items()
    }
    for size in LEARNING_RATES
}
# the losses of levels besides that of the next byte
LOSSES = {
    "default": {},
    "no reconstruction": dict(recon_loss_weight=0.0),
    "no hierarchical-ar": dict(objective="none"),
    "next byte alone": dict(objective="none", recon_loss_weight=0.0),
    "next-latent": dict(objective="next-latent"),
}


class Run(NamedTuple):
    corpus: str
    size: str = "25M"
    shape: str = "flat"
    losses: str = "default"
    seed: int = 0

    @property
    def name(self) -> str:
        """A file name."""
        words = *self[:4], f"seed {self.seed}"
        return "-".join(word.replace(", ", ".").replace(" ", "_") for word in words)

    def settings(self, steps: int, validations: int = 20) -> dict:
        """Return what `shtx train --config` takes for a run with so many validations."""
        shape = SHAPES[self.size][self.shape]
        return dict(
            split=(0.9, 0.05, 0.05),
            steps=steps,
            batch_size=BATCH,
            lr=LEARNING_RATES[self.size],
            schedule="wsd",
            seed=self.seed,
            eval_every=max(1, steps // validations),
            eval_sequences=256,
            save_every=steps,
            keep=1,
            model=shape.arguments() | LOSSES[self.losses],
        )


# The most telling runs come first, should the time be short.
RUNS = [
    *(Run("python", shape=shape) for shape in SHAPES["25M"]),
    *(Run(corpus, shape=shape) for corpus in ("english", "cpp") for shape in ("flat", "1, 4 by 4")),
    *(Run("python", "85M", shape) for shape in ("flat", "1, 4", "1, 4 by 4")),
    *(Run("python", shape="1, 4 by 4", losses=losses) for losses in list(LOSSES)[1:]),
    *(Run("python", shape=s, seed=seed) for seed in (1, 2) for s in ("flat", "1, 4 by 4")),
]
