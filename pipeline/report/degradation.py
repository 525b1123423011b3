"""The figure and the table of the degradation experiment: plain nets beside residual ones, as in He et al. 2015
(arXiv:1512.03385), figure 6 and table 6."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.report.charts import COLOURS, Floats, style_axes, thin

_SIZE = (10.5, 4.2)
_MOST_POINTS = 250
_NUM_TRAINING_POINTS = 40  # of a curve, each over an equal part of the training: single steps are noisy


@dataclass(frozen=True)
class Curve:
    """The errors of one net while it was trained.

    `steps`, `train_error` and `test_error` have one length; errors are shares, 0 to 1, and NaN where none was measured.
    """

    depth: int
    is_residual: bool
    steps: Floats
    train_error: Floats
    test_error: Floats

    @classmethod
    def of(
        cls,
        depth: int,
        is_residual: bool,
        history: Sequence[dict[str, Any]],
        evaluations: Sequence[dict[str, Any]],
        num_steps: int,
    ) -> "Curve":
        """The curve of a net from what its checkpoint holds of a training of `num_steps`.

        Training error is the mean over a 40th of the training, as it was met, on augmented images; the test error is
        that of each evaluation.
        """
        looks = np.array([entry["step"] for entry in history], np.float64)
        weights = np.diff(looks, prepend=0)
        part = np.ceil(looks * _NUM_TRAINING_POINTS / num_steps)
        parts, first = np.unique(part, return_index=True)
        errors = np.array([1 - entry["top1"] for entry in history])
        means = np.add.reduceat(weights * errors, first) / np.add.reduceat(weights, first)
        ends = looks[np.searchsorted(part, parts, side="right") - 1]
        train = dict(zip(ends.tolist(), means.tolist(), strict=True))
        test = {float(entry["step"]): 1 - entry["top1"] for entry in evaluations}
        steps = sorted(train.keys() | test.keys())
        train_error, test_error = (np.array([found.get(step, np.nan) for step in steps]) for found in (train, test))
        return cls(depth, is_residual, np.array(steps), train_error, test_error)

    def last_errors(self) -> dict[str, float]:
        """Those of the last step, by `training` and `test`; a finished training's end has both."""
        return {"training": round(float(self.train_error[-1]), 4), "test": round(float(self.test_error[-1]), 4)}

    def columns(self) -> dict[str, list[float | None]]:
        """Steps and errors as JSON takes them; None where nothing was measured."""
        columns = {"step": self.steps, "training_error": self.train_error, "test_error": self.test_error}
        return {
            name: [None if np.isnan(value) else round(float(value), 6) for value in values]
            for name, values in columns.items()
        }


def draw_degradation(curves: Sequence[Curve], *, most_error: float | None = None) -> Figure:
    """Plain nets on the left, residual ones on the right: training error thin, test error bold, a colour per depth.

    `most_error` is where the axis ends, a share; unset, at half as much again as the worst error at the end, so that
    the ends can be told apart. Both panels have the same axes. `charts.to_svg` makes a file of it. Raises ValueError
    where there is no curve, or two of one net.
    """
    _expect_one_of_each(curves)
    figure = Figure(figsize=_SIZE, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    depths = sorted({curve.depth for curve in curves})
    palette = matplotlib.colormaps["plasma"](np.linspace(0.8, 0.0, len(depths)))
    colours = dict(zip(depths, map(to_hex, palette), strict=True))
    for axes, is_residual in zip(panels, (False, True), strict=True):
        _draw_panel(axes, [curve for curve in _ordered(curves) if curve.is_residual == is_residual], colours)
        axes.set_title("residual" if is_residual else "plain", fontsize=12, color=COLOURS["ink"])
        axes.set_ylabel("error, %", fontsize=9.5, color=COLOURS["muted"])
        axes.tick_params(labelleft=True)
    panels[0].set_ylim(0, 100 * (_choose_most_error(curves) if most_error is None else most_error))
    panels[0].set_xlim(left=0)
    return figure


def build_table(curves: Sequence[Curve]) -> str:
    """The last errors measured, in %, as a Markdown table: a row per depth, plain beside residual.

    Raises ValueError where there is no curve, or two of one net.
    """
    _expect_one_of_each(curves)
    by_net = {(curve.depth, curve.is_residual): curve for curve in curves}
    rows = [
        "| layers | plain, training | plain, test | residual, training | residual, test |",
        "|---:|---:|---:|---:|---:|",
    ]
    for depth in sorted({curve.depth for curve in curves}):
        cells = [cell for is_residual in (False, True) for cell in _cells(by_net.get((depth, is_residual)))]
        rows.append(f"| {depth} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _draw_panel(axes: Axes, curves: Sequence[Curve], colours: dict[int, str]) -> None:
    style_axes(axes)
    for curve in curves:
        for errors, width in ((curve.train_error, 0.9), (curve.test_error, 2.0)):
            measured = np.isfinite(errors)
            steps, drawn = thin(curve.steps[measured], 100 * errors[measured], most=_MOST_POINTS)
            marker = "o" if len(steps) == 1 else None  # a line needs two
            axes.plot(steps, drawn, color=colours[curve.depth], lw=width, marker=marker)
    handles = [Line2D([], [], color=colours[curve.depth], lw=2.0, label=f"{curve.depth} layers") for curve in curves]
    handles += [
        Line2D([], [], color=COLOURS["muted"], lw=width, label=label)
        for width, label in ((2.0, "test"), (0.9, "training"))
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9.5, labelcolor=COLOURS["ink"], loc="upper right")


def _cells(curve: Curve | None) -> Iterator[str]:
    for errors in (curve.train_error, curve.test_error) if curve else ((), ()):
        last = _last(np.asarray(errors))
        yield "–" if last is None else f"{100 * last:.2f}"


def _choose_most_error(curves: Sequence[Curve]) -> float:
    lasts = [_last(errors) for curve in curves for errors in (curve.train_error, curve.test_error)]
    worst = max((last for last in lasts if last is not None), default=1.0)
    return min(1.0, np.ceil(20 * 1.5 * worst) / 20 or 0.05)


def _last(errors: Floats) -> float | None:
    finite = errors[np.isfinite(errors)]
    return float(finite[-1]) if len(finite) else None


def _ordered(curves: Sequence[Curve]) -> list[Curve]:
    return sorted(curves, key=lambda curve: curve.depth)


def _expect_one_of_each(curves: Sequence[Curve]) -> None:
    nets = [(curve.depth, curve.is_residual) for curve in curves]
    if not nets or len(set(nets)) < len(nets):
        raise ValueError(f"expected curves of different nets, got {nets or 'none'} as (depth, is_residual)")
