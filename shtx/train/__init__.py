"""Training of byte-level models: `shtx train`. Needs the extra `shtx[train]`."""

_LESS = "out of memory: lower --batch-size, --seq-len or --dim, or take --precision bf16-mixed"
OUT_OF_MEMORY = {
    "train": _LESS,
    "warmup": _LESS,
    "generate": "out of memory: shorten --prompt and --length, or take another --dtype or --device",
    "eval": "out of memory: lower --batch-size or --context, or take another --device",
    "data": "out of memory",
    "convert": "out of memory",
    "info": "out of memory",
}


class TrainError(Exception):
    """Something the user can put right, told in one line."""


def visible(text: str) -> str:
    """Text as it is; what would move the cursor, as escapes."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
