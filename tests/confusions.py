"""Confusions written as matrices, rows the truth; and how much memory something takes."""

import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipeline.report.confusion import Confusion
from pipeline.training.counts import Counts


def counts_of(matrix: npt.ArrayLike) -> Counts:
    """The counts of images judged so."""
    matrix = np.asarray(matrix)
    return Counts(len(matrix), Counter({pair: count for pair, count in enumerate(matrix.ravel().tolist()) if count}))


def confusion_of(matrix: npt.ArrayLike) -> Confusion:
    """The confusion of that matrix."""
    return counts_of(matrix).confusion


def matrix_of(confusion: Confusion) -> list[list[int]]:
    """The matrix of that confusion."""
    matrix = np.zeros((confusion.num_classes,) * 2, np.int64)
    matrix[confusion.truths, confusion.answers] = confusion.counts
    return matrix.tolist()


def traced_peak(action: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy have allocated at once in `action`."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
