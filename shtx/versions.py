"""Checkpoints of simple-hierarchical-transformer 0.2.0 and 0.4.0: which is which."""

from collections.abc import Iterable

MODULES = {"0.2.0": "shtx", "0.4.0": "shtx.next_latent"}

# beginnings or ends of keys that one version has alone
MARKS = {
    "0.2.0": (("to_hierarchical_preds.",), (".rotary_emb.inv_freq",)),
    "0.3.0": (("latent_ar_losses.",), ()),
    "0.4.0": (("latent_dynamics.", "chunk_summarizers."), (".rotary_emb.freqs",)),
}


def version_of(keys: Iterable[str]) -> str | None:
    """The version whose state_dict has such keys; None where several have."""
    keys = list(keys)
    for version, (begins, ends) in MARKS.items():
        if any(key.startswith(begins) or key.endswith(ends) for key in keys):
            return version
    return None


def refuse_other_version(keys: Iterable[str], version: str) -> None:
    """Raise a RuntimeError, as load_state_dict does, for the keys of another version."""
    found = version_of(keys)
    if found in (None, version):
        return
    hint = "which cannot be converted"
    if found in MODULES:
        hint = (
            f"which {MODULES[found]}.HierarchicalTransformer loads, and `shtx convert --to"
            f" {version}` or shtx.convert.convert makes one of {version} of"
        )
    raise RuntimeError(
        f"state_dict is that of a model of simple-hierarchical-transformer {found}, {hint}; this"
        f" model is of {version}"
    )
