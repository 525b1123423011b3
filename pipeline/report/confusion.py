"""The confusion matrix as pictures: a heat map, the most frequent confusions, the worst classes.

Drawn by hand rather than with matplotlib, for the class names: they come in any script, and every cell tells its
classes and its count when it is pointed at.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.report.page import Bar, count_columns, shorten, text

Counts = npt.NDArray[np.int64]

MOST_CLASSES = 24
_CELL = 27
_NAME_COLUMNS = 16
_PIXELS_PER_COLUMN = 5.8
_PALEST = 0.07


def choose_classes(confusion: Counts) -> list[int]:
    """The classes to draw: all where there are few, else those of the most frequent confusions, mutual ones together.

    `confusion` is C×C counts, rows the truth. Fewer than there is room for where only few are confused.
    """
    if len(confusion) <= MOST_CLASSES:
        return list(range(len(confusion)))
    truths, answers, counts = _wrong(confusion)
    pairs = np.minimum(truths, answers) * len(confusion) + np.maximum(truths, answers)
    pairs, inverse = np.unique(pairs, return_inverse=True)
    between = np.bincount(inverse, weights=counts)
    chosen: dict[int, None] = {}  # an ordered set
    for pair in pairs[np.argsort(-between, kind="stable")]:
        both = dict.fromkeys(divmod(int(pair), len(confusion)))
        if len(chosen | both) > MOST_CLASSES:
            break
        chosen |= both
    return list(chosen)


def draw_confusion(confusion: Counts, classes: Sequence[str], chosen: Sequence[int], *, alt: str) -> str:
    """The rows and columns of `chosen` as an inline SVG: a row is a true class, the diagonal is what was right.

    Colours and numbers are the share of the row's images, those of classes that are not drawn included; the wrong ones
    have a colour of their own, whose full strength is the largest of them.
    """
    totals = np.maximum(confusion.sum(1), 1)
    shares = {(row, column): confusion[row, column] / totals[row] for row in chosen for column in chosen}
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
            told = f"{classes[row]} → {classes[column]}: {confusion[row, column]:,} ({100 * share:.1f} %)"
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


def find_worst_classes(confusion: Counts, classes: Sequence[str], most: int) -> list[Bar]:
    """The classes with the largest share of errors, the worst first; those without images or errors are left out."""
    totals = confusion.sum(1)
    errors = totals - np.diagonal(confusion)
    shares = errors / np.maximum(totals, 1)
    worst = np.argsort(-shares, kind="stable")[:most]
    return [
        Bar(classes[index], float(shares[index]), f"{100 * shares[index]:.1f} % of {totals[index]:,}")
        for index in worst
        if errors[index]
    ]


def find_confusions(confusion: Counts, classes: Sequence[str], most: int) -> list[Bar]:
    """The most frequent confusions, the most frequent first; a bar is as long as its share of the largest."""
    truths, answers, counts = _wrong(confusion)
    totals = confusion.sum(1)
    return [
        Bar(
            f"{classes[truths[at]]} → {classes[answers[at]]}",
            counts[at] / counts.max(),
            f"{counts[at]:,} of {totals[truths[at]]:,}",
        )
        for at in np.argsort(-counts, kind="stable")[:most]
    ]


def _wrong(confusion: Counts) -> tuple[Counts, Counts, Counts]:
    """Truths, answers and counts of what was confused, row by row: of many classes far fewer than C×C."""
    truths, answers = np.nonzero(confusion)
    truths, answers = truths[truths != answers], answers[truths != answers]
    return truths, answers, confusion[truths, answers]
