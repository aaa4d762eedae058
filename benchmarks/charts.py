"""Charts of what was measured."""

from matplotlib.figure import Figure

from benchmarks.cells import number

COLORS = {"floor": "tab:gray", "floor-folded": "tab:gray", "fused": "tab:orange"}


def color_of(provider: str) -> str:
    return COLORS.get(provider, "tab:blue")


def panels_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by configuration."""
    panels = {}
    for row in rows:
        variant = f", {row['variant']}" if "variant" in row else ""
        panels.setdefault(row["config"] + variant, []).append(row)
    return panels


def bars(field: str, label: str, rows: list[dict]) -> Figure:
    """Providers as bars, a panel for each configuration."""
    panels = panels_of(rows)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = 1.0 + 0.32 * max(map(len, panels.values()))
    figure = Figure((6 * columns, 0.8 + lines * height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (config, shown) in zip(axes, panels.items(), strict=False):
        providers = [row["provider"] for row in shown]
        colors = map(color_of, providers)
        drawn = axis.barh(providers, [row[field] for row in shown], color=[*colors])
        axis.bar_label(drawn, [number(row[field]) for row in shown], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(title=f"configuration {config}", xlabel=label)
    return figure
