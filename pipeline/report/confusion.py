"""The confusion matrix, held as its entries, as pictures: a heat map, the most frequent confusions, the worst classes.

Drawn by hand rather than with matplotlib, for the class names: they come in any script, and every cell tells its
classes and its count when it is pointed at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.report.page import Bar, count_columns, shorten, text

IntArray: TypeAlias = npt.NDArray[np.int64]

MOST_CLASSES = 24
_CELL = 27
_NAME_COLUMNS = 16
_PIXELS_PER_COLUMN = 5.8
_PALEST = 0.07


@dataclass(frozen=True, eq=False, slots=True)
class Confusion:
    """How many images of each class were taken for which, an entry for each pair of class ids that occurred.

    int64 columns, sorted by truth, then answer; no pair twice, no count zero. The matrix of many classes is nearly
    empty, and for tens of thousands of them it takes gigabytes: it is never made.
    """

    num_classes: int
    truths: IntArray
    answers: IntArray
    counts: IntArray

    def by_truth(self) -> IntArray:
        """The images of each class, int64 of `num_classes`."""
        sums = np.bincount(self.truths, weights=self.counts, minlength=self.num_classes)
        return sums.astype(np.int64)

    def right(self) -> IntArray:
        """The images of each class that were answered with it, int64 of `num_classes`."""
        return self._where(self.truths == self.answers).by_truth()

    def wrong(self) -> "Confusion":
        """What was confused."""
        return self._where(self.truths != self.answers)

    def among(self, chosen: Sequence[int]) -> dict[tuple[int, int], int]:
        """The count of each pair that occurred of the classes `chosen`."""
        found = self._where(np.isin(self.truths, chosen) & np.isin(self.answers, chosen))
        pairs = zip(found.truths.tolist(), found.answers.tolist(), strict=True)
        return dict(zip(pairs, found.counts.tolist(), strict=True))

    def _where(self, is_kept: npt.NDArray[np.bool_]) -> "Confusion":
        return Confusion(self.num_classes, self.truths[is_kept], self.answers[is_kept], self.counts[is_kept])


def choose_classes(confusion: Confusion) -> list[int]:
    """The classes to draw: all where there are few, else those of the most frequent confusions, mutual ones together.

    Fewer than there is room for where only few are confused.
    """
    num_classes, wrong = confusion.num_classes, confusion.wrong()
    if num_classes <= MOST_CLASSES:
        return list(range(num_classes))
    pairs = np.minimum(wrong.truths, wrong.answers) * num_classes + np.maximum(wrong.truths, wrong.answers)
    pairs, inverse = np.unique(pairs, return_inverse=True)
    between = np.bincount(inverse, weights=wrong.counts)
    chosen: dict[int, None] = {}  # an ordered set
    for pair in pairs[np.argsort(-between, kind="stable")]:
        both = dict.fromkeys(divmod(int(pair), num_classes))
        if len(chosen | both) > MOST_CLASSES:
            break
        chosen |= both
    return list(chosen)


def draw_confusion(confusion: Confusion, classes: Sequence[str], chosen: Sequence[int], *, alt: str) -> str:
    """The rows and columns of `chosen` as an inline SVG: a row is a true class, the diagonal is what was right.

    Colours and numbers are the share of the row's images, those of classes that are not drawn included; the wrong ones
    have a colour of their own, whose full strength is the largest of them.
    """
    totals, drawn = np.maximum(confusion.by_truth(), 1), confusion.among(chosen)
    counts = {(row, column): drawn.get((row, column), 0) for row in chosen for column in chosen}
    shares = {(row, column): count / totals[row] for (row, column), count in counts.items()}
    largest = max((share for (row, column), share in shares.items() if row != column), default=0.0)
    names = [shorten(classes[index], _NAME_COLUMNS) for index in chosen]
    parts = []
    for y, row in enumerate(chosen):
        middle = (y + 0.5) * _CELL
        parts.append(f'<text x="-6" y="{middle}" text-anchor="end" dominant-baseline="central">{text(names[y])}</text>')
        parts.append(f'<text transform="translate({middle} -6) rotate(-45)">{text(names[y])}</text>')
        for x, column in enumerate(chosen):
            share = float(shares[row, column])
            strength = share if row == column else share / (largest or 1.0)
            told = f"{classes[row]} → {classes[column]}: {counts[row, column]:,} ({100 * share:.1f} %)"
            parts.append(_draw_cell(x, y, share, strength, is_right=row == column, told=told))
    margin = 14 + _PIXELS_PER_COLUMN * max(map(count_columns, names), default=0)
    top, side = 0.8 * margin, _CELL * len(chosen)
    width, height = side + margin + top, side + top
    return (
        f'<svg class="matrix" style="max-width:{1.25 * width:.0f}px" role="img" aria-label="{text(alt)}" '
        f'viewBox="{-margin:.0f} {-top:.0f} {width:.0f} {height:.0f}" font-size="11" fill="var(--ink)">'
        f"{''.join(parts)}</svg>"
    )


def _draw_cell(x: int, y: int, share: float, strength: float, *, is_right: bool, told: str) -> str:
    colour = "right" if is_right else "wrong"
    opacity = _PALEST + (1 - _PALEST) * strength if share else 0.03
    number = ""
    if round(100 * share):
        ink = "#ffffff" if opacity > 0.6 else "var(--ink)"
        number = (
            f'<text x="{(x + 0.5) * _CELL}" y="{(y + 0.5) * _CELL}" text-anchor="middle" dominant-baseline="central" '
            f'font-size="10" fill="{ink}">{100 * share:.0f}</text>'
        )
    return (
        f'<g><title>{text(told)}</title><rect x="{x * _CELL + 0.5}" y="{y * _CELL + 0.5}" width="{_CELL - 1}" '
        f'height="{_CELL - 1}" rx="2" fill="var(--{colour})" fill-opacity="{opacity:.3f}"/>{number}</g>'
    )


def find_worst_classes(confusion: Confusion, classes: Sequence[str], most: int) -> list[Bar]:
    """The classes with the largest share of errors, the worst first; those without images or errors are left out."""
    totals, errors = confusion.by_truth(), confusion.wrong().by_truth()
    shares = errors / np.maximum(totals, 1)
    worst = np.argsort(-shares, kind="stable")[:most]
    return [
        Bar(classes[index], float(shares[index]), f"{100 * shares[index]:.1f} % of {totals[index]:,}")
        for index in worst
        if errors[index]
    ]


def find_confusions(confusion: Confusion, classes: Sequence[str], most: int) -> list[Bar]:
    """The most frequent confusions, the most frequent first; a bar is as long as its share of the largest."""
    wrong, totals = confusion.wrong(), confusion.by_truth()
    return [
        Bar(
            f"{classes[wrong.truths[at]]} → {classes[wrong.answers[at]]}",
            wrong.counts[at] / wrong.counts.max(),
            f"{wrong.counts[at]:,} of {totals[wrong.truths[at]]:,}",
        )
        for at in np.argsort(-wrong.counts, kind="stable")[:most]
    ]
