"""Counts add up over ranks and become figures."""

import json
import pickle
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.training.counts import Counts, from_entries, to_entries
from tests.confusions import counts_of, matrix_of, traced_peak


def test_counts_add_up_over_ranks_and_stay_what_they_were():
    first = replace(counts_of([[3, 1], [0, 2]]), num_errors=1, top5=6, loss_sum=1.5)
    second = replace(counts_of([[0, 1], [2, 0]]), num_errors=2, top5=3, loss_sum=0.25)
    total = first.summed(lambda mine: [mine, second])
    assert matrix_of(total.confusion) == [[3, 2], [2, 2]]
    assert matrix_of(first.confusion) == [[3, 1], [0, 2]]
    assert (total.num_images, total.num_errors, total.top1, total.top5, total.loss_sum) == (9, 3, 5, 9, 1.75)
    assert (total.top1_accuracy, total.top5_accuracy, total.top1_error, total.top5_error) == (5 / 9, 1, 4 / 9, 0)


@given(st.integers(1, 6).flatmap(lambda size: arrays(np.int64, (size, size), elements=st.sampled_from([0, 0, 1, 7]))))
def test_a_confusion_is_kept_as_its_entries_row_by_row(matrix):
    entries = to_entries(counts_of(matrix).confusion)
    assert {name: (column.dtype, column.tolist()) for name, column in entries.items()} == {
        name: (torch.int64, column.tolist())
        for name, column in zip(("truths", "answers", "counts"), (*np.nonzero(matrix), matrix[matrix > 0]), strict=True)
    }
    assert matrix_of(from_entries(entries, len(matrix))) == matrix.tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30), st.integers(0, 30))
def test_images_are_counted_in_any_batches(pairs, cut):
    counts = Counts(4)
    for batch in (pairs[:cut], pairs[cut:]):
        truths, answers = np.array(batch, np.int64).reshape(-1, 2).T
        counts.add(truths, answers)
    matrix = np.zeros((4, 4), np.int64)
    for truth, answer in pairs:
        matrix[truth, answer] += 1
    assert matrix_of(counts.confusion) == matrix.tolist()
    assert (counts.num_images, counts.top1) == (len(pairs), matrix.trace())
    assert counts.confusion.by_truth().tolist() == matrix.sum(1).tolist()
    assert counts.confusion.right().tolist() == matrix.diagonal().tolist()


def test_many_classes_take_the_memory_of_their_images_and_not_of_their_square():
    num_classes, num_images = 20_000, 5_000

    def judge() -> None:
        truths, answers = np.random.default_rng(0).integers(0, num_classes, (2, num_images))
        counts = Counts(num_classes)
        counts.add(truths, answers)
        total = counts.summed(lambda mine: [mine, pickle.loads(pickle.dumps(mine))])
        assert total.as_dict()["num_images"] == 2 * num_images
        assert len(total.by_class([""] * num_classes)) == num_classes
        assert from_entries(to_entries(total.confusion), num_classes).counts.sum() == 2 * num_images

    assert traced_peak(judge) < 50e6  # a matrix is 3,200e6


def test_figures_without_images_are_null_in_json():
    counts = replace(counts_of([[1, 1], [0, 0]]), top5=2, loss_sum=3.0)
    assert counts.as_dict() == {
        "num_images": 2,
        "num_errors": 0,
        "top1": 1,
        "top5": 2,
        "top1_accuracy": 0.5,
        "top5_accuracy": 1.0,
        "top1_error": 0.5,
        "top5_error": 0.0,
        "loss": 1.5,
    }
    empty = json.loads(json.dumps(Counts(2).as_dict(), allow_nan=False))
    assert (empty["num_images"], empty["top1_accuracy"], empty["top5_error"], empty["loss"]) == (0, None, None, None)


def test_classes_of_one_name_keep_figures_of_their_own():
    counts = counts_of([[3, 1, 0], [0, 0, 0], [1, 1, 2]])
    assert counts.by_class(["crane", "dog", "crane"]) == [
        {"class": "crane", "num_images": 4, "top1": 3, "top1_accuracy": 0.75},
        {"class": "dog", "num_images": 0, "top1": 0, "top1_accuracy": None},
        {"class": "crane", "num_images": 4, "top1": 2, "top1_accuracy": 0.5},
    ]
