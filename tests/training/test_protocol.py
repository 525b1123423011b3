"""Protocols are refused where they make no sense, and say what they are."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError
from pipeline.training.protocol import Protocol


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": "ten_crop", "flip": True}, "mirror images already"),
        ({"scales": [224, 224]}, "each of scales once"),
        ({"scales": []}, "at least 1 item"),
        ({"scales": [1]}, "greater than or equal to 2"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Protocol(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "1-crop 32 of 40, bilinear"),
        ({"flip": True}, "1-crop 32 of 40, bilinear, with mirror image"),
        ({"views": "ten_crop"}, "10-crop 32 of 40, bilinear"),
        ({"views": "multi_scale", "scales": [24, 32]}, "multi-scale 24/32, whole image, bilinear"),
    ],
)
def test_a_protocol_describes_itself(fields, words):
    assert Protocol(**fields).describe(Preprocessing(resize_size=40, crop_size=32)) == words


def test_ten_crops_that_do_not_fit_are_refused():
    preprocessing = Preprocessing(resize_size=28, crop_size=32)
    with pytest.raises(ConfigError, match=r"resize_size is at least its crop_size, got 28 and 32; use one_crop"):
        Protocol(views="ten_crop").check(preprocessing)
    Protocol().check(preprocessing)


def test_a_protocol_is_described_without_torch():
    code = "import sys, pipeline.training.protocol; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
