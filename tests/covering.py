"""Model configurations that cover every pair of values of two factors."""

from collections.abc import Callable
from itertools import combinations
from random import Random

COUNT = 44
TOKENS = 48  # longest sequence

FACTORS = dict(
    hierarchies=[1, (1, 2), (1, 4), (4, 1), (1, 2, 8), (2, 4), (1, 16)],
    stride=["one", "half", "all"],  # as a part of the compression
    window=["none", "zero", "small", "large", "mixed"],
    dim=["equal", "wide first", "narrow first", "odd"],
    dim_head=[4, 8, 16],
    heads=[1, 3],
    ff_mult=[4, 1.5],
    hierarchy_merge_all=[False, True],
    predict_use_all_hierarchy=[False, True],
    predict=["default", "last"],
    recon_loss_weight=[0.1, 0.0, 0.7],
    hierarchical_ar_loss_weight=[0.25, 0.0],
    tokens=[33, 34, 48],
    ignore_index=[0, 5, -100],
    ablate=[False, True],
)


def build(row: dict) -> dict | None:
    """A row of factors as upstream's arguments; None where the model has no next-token loss."""
    hierarchies = row["hierarchies"]
    levels = hierarchies if isinstance(hierarchies, tuple) else (hierarchies,)
    strides = tuple({"one": 1, "half": max(1, c // 2), "all": c}[row["stride"]] for c in levels)
    count, last = len(levels), row["predict"] == "last"
    stride = strides[-1] if last else strides[levels.index(min(levels))]
    if stride > 1 and not row["hierarchy_merge_all"]:
        return None
    if (min(strides) if row["predict_use_all_hierarchy"] else stride) > 1:
        return None
    dims = {
        "equal": 12,
        "wide first": tuple(16 - 3 * i for i in range(count)),
        "narrow first": tuple(8 + 4 * i for i in range(count)),
        "odd": tuple(11 + 2 * i for i in range(count)),
    }[row["dim"]]
    windows = {
        "none": None,
        "zero": 0,
        "small": 3,
        "large": 1000,
        "mixed": (2, None, 4)[:count],
    }[row["window"]]
    same = ("dim_head", "heads", "ff_mult", "hierarchy_merge_all", "predict_use_all_hierarchy")
    same += ("recon_loss_weight", "hierarchical_ar_loss_weight", "ignore_index", "hierarchies")
    return {name: row[name] for name in same} | dict(
        num_tokens=19,
        depth=2,
        seq_len=TOKENS,
        dim=dims,
        window_sizes=windows,
        hierarchical_stride=strides if count > 1 else strides[0],
        predict_hierarchy=levels[-1] if last else None,
    )


def pairs(row: dict) -> set:
    return set(combinations(row.items(), 2))


def covering_rows(factors: dict, is_valid: Callable[[dict], bool], candidates: int) -> list[dict]:
    """COUNT rows, or as many more as all pairs take that `candidates` random rows have."""
    random = Random(0)
    valid = []
    while len(valid) < candidates:
        row = {name: random.choice(values) for name, values in factors.items()}
        if is_valid(row):
            valid.append((row, pairs(row)))
    missing = set().union(*(covered for _, covered in valid))
    rows = []
    while missing or len(rows) < COUNT:
        best = max(valid, key=lambda candidate: len(candidate[1] & missing))
        missing -= best[1]
        rows.append(best[0])
        valid.remove(best)
    return rows


def arguments_tokens_ablate() -> list[tuple[dict, int, bool]]:
    rows = covering_rows(FACTORS, lambda row: build(row) is not None, 2000)
    return [(build(row), row["tokens"], row["ablate"]) for row in rows]


ROWS = arguments_tokens_ablate()
