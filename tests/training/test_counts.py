"""Counts add up over ranks and become figures."""

import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.training.counts import Counts, from_entries, to_entries


def test_counts_add_up_as_tensors():
    first = Counts(np.array([[3, 1], [0, 2]]), num_errors=1, top5=6, loss_sum=1.5)
    second = Counts(np.array([[0, 1], [2, 0]]), num_errors=2, top5=3, loss_sum=0.25)
    tensor = first.to_tensor() + second.to_tensor()
    assert tensor.dtype == torch.int64
    total = Counts.from_tensor(tensor, 1.75)
    assert total.confusion.tolist() == [[3, 2], [2, 2]]
    assert (total.num_images, total.num_errors, total.top1, total.top5, total.loss_sum) == (9, 3, 5, 9, 1.75)
    assert (total.top1_accuracy, total.top5_accuracy, total.top1_error, total.top5_error) == (5 / 9, 1, 4 / 9, 0)


@given(st.integers(1, 6).flatmap(lambda size: arrays(np.int64, (size, size), elements=st.sampled_from([0, 0, 1, 7]))))
def test_a_confusion_is_kept_as_its_entries(confusion):
    entries = to_entries(confusion)
    assert len(entries["counts"]) == np.count_nonzero(confusion)
    assert from_entries(entries, len(confusion)).tolist() == confusion.tolist()


def test_figures_without_images_are_null_in_json():
    counts = Counts(np.array([[1, 1], [0, 0]]), top5=2, loss_sum=3.0)
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
    empty = json.loads(json.dumps(Counts.empty(2).as_dict(), allow_nan=False))
    assert (empty["num_images"], empty["top1_accuracy"], empty["top5_error"], empty["loss"]) == (0, None, None, None)


def test_classes_of_one_name_keep_figures_of_their_own():
    counts = Counts(np.array([[3, 1, 0], [0, 0, 0], [1, 1, 2]]))
    assert counts.by_class(["crane", "dog", "crane"]) == [
        {"class": "crane", "num_images": 4, "top1": 3, "top1_accuracy": 0.75},
        {"class": "dog", "num_images": 0, "top1": 0, "top1_accuracy": None},
        {"class": "crane", "num_images": 4, "top1": 2, "top1_accuracy": 0.5},
    ]
