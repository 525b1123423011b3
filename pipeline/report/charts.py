"""Line charts as SVG: inside a page, where they take the page's colours, or as a file that stands alone.

matplotlib draws through `Figure` and its SVG backend, without pyplot, whose windows and current figure are global, so
a driver's thread may draw. Nothing from outside is written into a chart: matplotlib's font lacks most scripts.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Floats = npt.NDArray[np.float64]

# As in the page's style sheet, whose variables of these names take their place.
COLOURS = {
    "ink": "#1b2430",
    "muted": "#5c6878",
    "grid": "#e2e6eb",
    "train": "#c2620e",
    "evaluation": "#2259d6",
}

_POINTS_PER_INCH = 45
_FEW_POINTS = 40
_ROUND = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True)
class Line:
    """One line of a chart: values over steps, both of length N, and the name of its colour."""

    name: str
    steps: Floats
    values: Floats
    colour: str
    width: float = 1.8


def draw_lines(lines: Sequence[Line], *, size: tuple[float, float], alt: str) -> str:
    """Lines over steps, from zero upwards, as an inline SVG; an empty string where no line has a point.

    `size` is width and height in inches of 72 pixels, `alt` what is read out to those who do not see it.
    """
    drawn = [line for line in lines if len(line.steps)]
    if not drawn:
        return ""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for line in drawn:
        marker = "o" if len(line.steps) <= _FEW_POINTS else ""
        axes.plot(
            *thin(line.steps, line.values, most=round(_POINTS_PER_INCH * size[0])),
            color=COLOURS[line.colour],
            lw=line.width,
            marker=marker,
            ms=3.5,
            label=line.name,
        )
    style_axes(axes)
    extremes = [0.0, *(line.values.min() for line in drawn), *(line.values.max() for line in drawn)]
    axes.set_ylim(1.05 * min(extremes), 1.05 * max(extremes) or 1.0)
    axes.set_xlim(0, 1.02 * max(line.steps.max() for line in drawn) or 1.0)
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=COLOURS["ink"])
    return _to_inline(figure, alt)


def thin(steps: Floats, values: Floats, *, most: int) -> tuple[Floats, Floats]:
    """At most `most` points of a line, each the mean of as many neighbours."""
    group = max(1, -(-len(steps) // most))
    starts = np.arange(0, len(steps), group)
    counts = np.diff(starts, append=len(steps))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def style_axes(axes: Axes) -> None:
    """A quiet frame: no box, pale horizontal lines, few ticks, whole steps with their thousands."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])
    axes.grid(axis="y", color=COLOURS["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLOURS["muted"], labelsize=9.5, length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel("step", fontsize=9.5, color=COLOURS["muted"])


def to_svg(figure: Figure, *, text_as_paths: bool = True) -> bytes:
    """A figure as an SVG file; the same figure gives the same bytes. Text is drawn as outlines, or left to the reader's
    fonts."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path" if text_as_paths else "none", "svg.hashsalt": "report"}):
        figure.savefig(
            out,
            format="svg",
            transparent=not text_as_paths,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return out.getvalue()


def _to_inline(figure: Figure, alt: str) -> str:
    svg = to_svg(figure, text_as_paths=False).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart, and referred to by none
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
