"""Draws docs/idea.svg, the picture of README: python docs/draw_idea.py"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

TEXT = "a hierarchical transf"[:16]
LEVELS = [  # compression, stride, colour, bottom of the lane
    (1, 1, "#4c78a8", 1.5),
    (4, 2, "#f58518", 3.7),
    (8, 4, "#54a24b", 5.9),
]
CELL, HEIGHT = 0.5, 0.72
STRIP = CELL * len(TEXT)
BLOCK, MERGE = STRIP + 1.0, STRIP + 5.3  # left edges

plt.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "shtx", "font.size": 10}


def arrow(ax, start, end, **style):
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#555555", "lw": 1.2} | style
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def box(ax, x, y, width, height, text, colour):
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, fc="white", ec=colour, lw=1.6)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def main():
    figure, ax = plt.subplots(figsize=(10.2, 5))
    for i, letter in enumerate(TEXT):
        ax.add_patch(Rectangle((i * CELL, 0), CELL, HEIGHT, fc="#eeeeee", ec="white"))
        ax.text((i + 0.5) * CELL, HEIGHT / 2, letter, ha="center", va="center", family="monospace")
    ax.text(STRIP + 0.2, HEIGHT / 2, "input tokens", va="center", color="#555555")

    for compress, stride, colour, y in LEVELS:
        middle = y + HEIGHT / 2
        for start in range(0, len(TEXT), stride):
            face = dict(fc=colour, ec="white", alpha=0.35 + 0.4 * (start // stride % 2))
            ax.add_patch(Rectangle((start * CELL, y), stride * CELL, HEIGHT, **face))
        # the last token of the lane, and the input tokens it is a convolution of
        left = (len(TEXT) - stride) * CELL
        last = len(TEXT) - stride + 1  # a strided token ends with the first token of its cell
        feet = [((last - compress) * CELL, HEIGHT), (last * CELL, HEIGHT)]
        ax.add_patch(Polygon([*feet, (STRIP, y), (left, y)], fc=colour, alpha=0.13, zorder=0))
        ax.text(
            0, y + HEIGHT + 0.12, f"level {compress}x, stride {stride}", color=colour, weight="bold"
        )
        box(ax, BLOCK, y - 0.2, 3.3, HEIGHT + 0.4, "token shift, attention,\nfeed-forward", colour)
        arrow(ax, (STRIP + 0.1, middle), (BLOCK - 0.05, middle), color=colour)
        arrow(ax, (BLOCK + 3.35, middle), (MERGE - 0.05, middle), color=colour)

    low, high = LEVELS[0][3] - 0.2, LEVELS[-1][3] + HEIGHT + 0.2
    box(ax, MERGE, low, 1.1, high - low, "merge", "#555555")
    middle = LEVELS[0][3] + HEIGHT / 2
    arrow(ax, (MERGE + 1.15, middle), (MERGE + 2.0, middle))
    ax.text(MERGE + 2.1, middle, "next token", va="center", weight="bold")
    frame = dict(boxstyle="round,pad=0,rounding_size=0.2", fc="none", ec="#999999", ls=(0, (4, 3)))
    ax.add_patch(
        FancyBboxPatch((BLOCK - 0.4, low - 0.3), MERGE + 1.5 - BLOCK, high - low + 0.6, **frame)
    )
    ax.text(BLOCK - 0.3, high + 0.42, "one layer, repeated depth times", color="#555555")

    ax.set_xlim(-0.2, MERGE + 4.1)
    ax.set_ylim(-0.2, high + 0.9)
    ax.set_aspect("equal")
    ax.axis("off")
    path = Path(__file__).with_name("idea.svg")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
