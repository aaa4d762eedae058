"""Training of byte-level models: `shtx train`. Needs the extra `shtx[train]`."""

OUT_OF_MEMORY = "out of GPU memory: lower --batch-size or --seq-len, or take --precision bf16-mixed"


class TrainError(Exception):
    """Something the user can put right, told in one line."""
