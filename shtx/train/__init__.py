"""Training of byte-level models: `shtx train`. Needs the extra `shtx[train]`."""


class TrainError(Exception):
    """Something the user can put right, told in one line."""
